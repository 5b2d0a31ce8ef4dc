#!/usr/bin/env bash
# Proves each policy of deploy/iam: everything in it is called, one action less is refused, and real daemons call no other.
# Ends with one line: iam: minimal=yes policies=N
set -euo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
FLATWIRE_BIN_DIR=${FLATWIRE_BIN_DIR:-$(cd "${CARGO_TARGET_DIR:-target}" && pwd)/flatwire}
export FLATWIRE_BIN_DIR
for suite in '--test servers -- iam' '--test iam --'; do
  # shellcheck disable=SC2086
  cargo test --release --workspace $suite --nocapture --test-threads=1 >>"$log" 2>&1 ||
    { cat "$log" >&2; echo "iam: a policy is not what the daemon needs; see above" >&2; exit 1; }
done
grep -E '^iam:' "$log"
proved=$(sed -nE 's/^iam: (policy-[a-z0-9-]+\.json) actions=[0-9]+$/\1/p' "$log" | sort -u)
for policy in deploy/iam/*.json; do
  grep -qx "$(basename "$policy")" <<<"$proved" || { echo "iam: nothing proves $policy" >&2; exit 1; }
done
echo "iam: $(grep -cE '^test a_daemon_.*' "$log") kinds of daemons in the lab called nothing that their policy does not have"
echo "iam: minimal=yes policies=$(wc -l <<<"$proved")"
