#!/usr/bin/env bash
# Proves each policy of deploy/iam: everything in it is called, one action less is refused, and real daemons call no other.
# Ends with one line: iam: minimal=yes policies=N
set -euo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
FLATWIRE_BIN_DIR=${FLATWIRE_BIN_DIR:-$(cd "${CARGO_TARGET_DIR:-target}" && pwd)/flatwire}
export FLATWIRE_BIN_DIR
cargo test --release --workspace --test servers --test iam -- iam --include-ignored --nocapture 2>&1 | tee "$log" |
  { grep -E '^(iam:|test .* (ok|FAILED)$|error)|panicked' || true; }
proved=$(sed -nE 's/.*iam: (policy-[a-z0-9-]+\.json) actions=[0-9]+$/\1/p' "$log" | sort -u)
for policy in deploy/iam/*.json; do
  grep -qx "$(basename "$policy")" <<<"$proved" || { echo "iam: nothing proves $policy" >&2; exit 1; }
done
grep -q '^test result: FAILED' "$log" && exit 1
echo "iam: minimal=yes policies=$(wc -l <<<"$proved")"
