#!/usr/bin/env bash
# Installs Debian's Chromium and its driver unless they are there; where it cannot, the last line says why.
set -euo pipefail
type -P chromium >/dev/null && type -P chromedriver >/dev/null && exit
[[ $EUID == 0 ]] && type -P apt-get >/dev/null || { echo "chromium and chromedriver are missing; as root on Debian they are installed here" >&2; exit 1; }
"$(dirname "$0")/../apt.sh" chromium chromium-driver
