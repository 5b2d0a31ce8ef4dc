#!/usr/bin/env bash
# Kubernetes on the lab: finds or builds its programs, starts it, and
#   judge   installs Flatwire by the chart, and judges; ends with one line
#   stay    leaves it to you
#   usage: tests/e2e/run.sh judge|stay FOLDER (of the release programs e2e and peer); FLATWIRE_BIN_DIR has the daemon, the plugin and the lab
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
usage="usage: tests/e2e/run.sh judge|stay FOLDER"
what=${1:?$usage}
programs=${2:?$usage}
need=()
command -v etcd >/dev/null || need+=(etcd-server)
command -v conntrack >/dev/null || need+=(conntrack)
command -v openssl >/dev/null || need+=(openssl)
if [ ${#need[@]} -gt 0 ]; then
  echo "e2e: installing ${need[*]} with apt-get"
  "$here/../apt.sh" "${need[@]}"
fi
kubernetes=$("$here/kubernetes.sh")
echo "e2e: Kubernetes' programs are in $kubernetes"
[ "$what" = stay ] || echo "e2e: what follows takes about eight minutes on two processors"
python=$("$here/../python.sh" chart)/bin/python
exec "$programs/e2e" "$what" "$kubernetes" "$python"
