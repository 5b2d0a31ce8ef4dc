#!/usr/bin/env bash
# Every test, in the order in which a failure says most: pure ones first, the whole path last. Ends with one line.
set -uo pipefail
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}
export FLATWIRE_BIN_DIR=${FLATWIRE_BIN_DIR:-$(cd "$target" && pwd)/flatwire}
if [ "$(id -u)" != 0 ]; then
  echo 'test: network namespaces need root: sudo env "PATH=$PATH" "HOME=$HOME" make test' >&2
  exit 2
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
started=$SECONDS
echo "test: building the tests"
cargo test --release --workspace --no-run 2>&1 | { grep -E '^(error|warning: unused)|Finished' || true; }
# The longest wait there is: a hanging test must not hang whoever waits for the answer.
timeout 3000 cargo test --release --workspace --no-fail-fast -- --show-output 2>&1 | tee "$log" |
  { grep -E '^(test result|running [1-9]|     Running|test .*(FAILED|ignored)|failures:|error)|SKIPPED|panicked' || true; }
status=${PIPESTATUS[0]}
counts=$(awk '/^test result:/ { p += $4; f += $6; i += $8 } END { print p + 0, f + 0, i + 0 }' "$log")
read -r ok bad skipped <<<"$counts"
if [ "$bad" != 0 ] || [ "$status" != 0 ]; then
  echo "test: what failed, from the log"
  awk '/^failures:/,/^test result/' "$log" | head -400
fi
[ "$status" = 0 ] || echo "test: cargo test ended with $status"
skips=$(grep -c 'SKIPPED' "$log" || true)
echo "test: took $((SECONDS - started)) s; skipped: $skips parts (SKIPPED above, with reasons), $skipped tests (ignored by name)"
echo "flatwire: $ok passed, $bad failed, $((skips + skipped)) skipped"
[ "$bad" = 0 ] && [ "$status" = 0 ] && [ "$ok" -gt 0 ]
