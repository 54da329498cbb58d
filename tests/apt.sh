#!/usr/bin/env bash
# apt.sh PACKAGE...: installs Debian packages; one call at a time, for tests run in several processes.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
exec 9>"${TMPDIR:-/tmp}/in-tool-learning-apt.lock"
flock 9
apt-get -qq update
apt-get -qq -o DPkg::Lock::Timeout=120 install -y --no-install-recommends "$@" >/dev/null
