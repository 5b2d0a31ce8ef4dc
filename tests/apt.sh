#!/usr/bin/env bash
# Installs Debian packages and nothing else: no recommended ones, and no service is started.
#   usage: tests/apt.sh PACKAGE...
set -euo pipefail
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo)
# Debian starts what it installs. This is how one says no to that, for as long as it takes.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  trap '"${as_root[@]}" rm -f $policy' EXIT
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee $policy >/dev/null
  "${as_root[@]}" chmod 755 $policy
fi
"${as_root[@]}" apt-get -o DPkg::Lock::Timeout=300 update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "$@" >/dev/null
