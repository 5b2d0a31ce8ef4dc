#!/usr/bin/env bash
# Installs the Debian packages that building and testing need, and says so. Does nothing when they are there.
#   ip, nft            the independent judges of what the kernel holds (tests only; Flatwire itself executes neither)
#   iptables           both backends, for rules of the shapes kube-proxy makes (tests and the lab only)
#   /usr/lib/cni       portmap, bandwidth and tuning, which run behind our plugin in tests
#   containerd, runc,  the runtimes that tests run inside the lab's nodes, and there alone: their services are not started
#   podman
#   cc, cmake          aws-lc, the TLS library under the AWS SDK, is C
#   musl               the plugin's C library, by rustup; does without where that cannot be had
#   ca-certificates    go into the image, which a test makes
#   git, kill          the rules of the repository are tests, and daemons are killed in tests
#   python3-venv       the AWS CLI, boto3, moto and LocalStack run in private virtual environments
set -euo pipefail
command -v cargo >/dev/null || { echo "deps: Rust is missing; install it first (rustup, stable 1.95 or later)" >&2; exit 2; }
triple=$(rustc -vV | sed -n 's/^host: //p')
musl=${triple%-gnu}-musl
if [ "$musl" != "$triple-musl" ] && [ ! -d "$(rustc --print sysroot)/lib/rustlib/$musl/lib" ]; then
  echo "deps: fetching Rust's standard library for $musl, for the plugin"
  rustup target add "$musl" >/dev/null 2>&1 || echo "deps: $musl is not to be had; the plugin is linked with glibc and starts 0.2 ms later"
fi
need=()
command -v ip >/dev/null || need+=(iproute2)
command -v nft >/dev/null || need+=(nftables)
command -v iptables-legacy >/dev/null && command -v iptables-nft >/dev/null || need+=(iptables)
[ -x /usr/lib/cni/portmap ] || need+=(containernetworking-plugins)
# Docker's own packages bring the first two, and must not be replaced: hence by program.
command -v containerd >/dev/null || need+=(containerd)
command -v runc >/dev/null || [ -x /usr/sbin/runc ] || need+=(runc)
command -v podman >/dev/null || need+=(podman)
command -v cc >/dev/null || need+=(build-essential)
command -v cmake >/dev/null || need+=(cmake)
command -v python3 >/dev/null || need+=(python3)
[ -f /etc/ssl/certs/ca-certificates.crt ] || need+=(ca-certificates)
command -v git >/dev/null || need+=(git)
command -v kill >/dev/null && [ -x /bin/kill ] || need+=(procps)
python3 -c 'import ensurepip' 2>/dev/null || need+=(python3-venv)
[ ${#need[@]} -eq 0 ] && exit 0
echo "deps: installing ${need[*]} with apt-get"
"$(dirname "$0")/apt.sh" "${need[@]}"
