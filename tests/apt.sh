#!/usr/bin/env bash
# apt.sh PACKAGE...: installs Debian packages; one call at a time, for tests run in several processes.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
exec 9>"${TMPDIR:-/tmp}/in-tool-learning-apt.lock"
flock 9
installed=$(dpkg-query --show --showformat '${db:Status-Status}\n' "$@" 2>/dev/null | grep -cx installed) || true
[[ $installed == $# ]] && exit  # by another process, while this one waited
apt-get -qq update
apt-get -qq -o DPkg::Lock::Timeout=120 install -y --no-install-recommends "$@" >/dev/null
