#!/usr/bin/env bash
# Renders the chart with Helm's engine and validates what comes out against Kubernetes' schemas.
#   usage: tests/chart.sh [CHART] [--write]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
venv=$("$root/tests/python.sh" chart)
# Helm is a library in this process: should it fall over, it is to say so.
PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 exec "$venv/bin/python" "$root/tests/chart/check.py" "${1:-$root/deploy/chart}" "${@:2}"
