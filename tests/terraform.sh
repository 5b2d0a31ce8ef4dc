#!/usr/bin/env bash
# Checks Terraform modules without AWS and without a registry: the rules of tests/terraform/rules.py always, and with
# terraform or tofu on the PATH also fmt, validate and test, against stand-ins that have the providers' schemas.
#   usage: tests/terraform.sh [FOLDER]      ends with one line: terraform: rules=… fmt=… validate=… test=…
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
modules=$(realpath "${1:-$root/terraform}")
own=$root/tests/terraform
venv=$("$root/tests/python.sh" terraform)
cache=${FLATWIRE_PYTHON_DIR:-$root/target/python}/terraform-schemas
scratch=$(mktemp -d)
pids=()
cleanup() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  rm -rf "$scratch"
}
trap cleanup EXIT

# The bindings are read and never installed: 59 MB in one file.
wheel() {
  local found
  found=$(compgen -G "$cache/$(tr - _ <<<"${1%%==*}")-${1##*==}-*.whl" || true)
  if [ -z "$found" ]; then
    mkdir -p "$cache"
    echo "terraform: downloading $1, for its provider's schema (once)" >&2
    "$venv/bin/pip" download --quiet --disable-pip-version-check --no-deps -d "$cache" "$1" >&2
    found=$(compgen -G "$cache/$(tr - _ <<<"${1%%==*}")-${1##*==}-*.whl")
  fi
  echo "$found"
}
types() { # the resources and data sources of one provider that the modules use
  find "$modules" -name '*.tf' -exec grep -hoE '^(resource|data) "'"$1"'_[a-z0-9_]+"' {} + |
    sed -E 's/^resource "//; s/^data "/data./; s/"$//' | sort -u
}
declare -A bindings=([aws]=cdktf-cdktf-provider-aws==21.22.1 [helm]=cdktf-cdktf-provider-helm==12.1.2)
for provider in aws helm; do
  mapfile -t used < <(types "$provider")
  "$venv/bin/python" "$own/schema.py" "$scratch/$provider.json" "$(wheel "${bindings[$provider]}")" "${used[@]}"
done

"$venv/bin/python" "$own/rules.py" "$modules" "$scratch/aws.json" "$scratch/helm.json"

tool=$(command -v terraform || command -v tofu || true)
if [ -z "$tool" ]; then
  echo "terraform: SKIPPED fmt, validate and test: neither terraform nor tofu is on the PATH"
  echo "terraform: rules=yes fmt=skipped validate=skipped test=skipped"
  exit 0
fi
export TF_CLI_CONFIG_FILE=/dev/null CHECKPOINT_DISABLE=1 TF_IN_AUTOMATION=1 TF_CLI_ARGS=-no-color
"$tool" fmt -check -diff -recursive "$modules" || { echo "terraform: not formatted; run: terraform fmt -recursive terraform" >&2; exit 1; }

"$venv/bin/python" -m grpc_tools.protoc -I "$own" --python_out="$scratch" --grpc_python_out="$scratch" "$own/tfplugin5.proto"
attached=()
for provider in aws helm; do
  mkfifo "$scratch/$provider.in" "$scratch/$provider.out"
  "$venv/bin/python" "$own/provider.py" "$scratch/$provider.json" "$scratch/$provider.sock" "$scratch" \
    <"$scratch/$provider.in" >"$scratch/$provider.out" &
  pids+=($!)
  # Held open by this script, so that the stand-in ends when it does, however it ends.
  exec {hold}>"$scratch/$provider.in"
  read -r -t 60 ready <"$scratch/$provider.out" && [ "$ready" = ready ] ||
    { echo "terraform: the stand-in for provider $provider did not start" >&2; exit 1; }
  for registry in registry.terraform.io registry.opentofu.org; do
    attached+=("\"$registry/hashicorp/$provider\":{\"Protocol\":\"grpc\",\"ProtocolVersion\":5,\"Pid\":${pids[-1]},\"Test\":true,\
\"Addr\":{\"Network\":\"unix\",\"String\":\"$scratch/$provider.sock\"}}")
  done
done
TF_REATTACH_PROVIDERS="{$(IFS=,; echo "${attached[*]}")}"
export TF_REATTACH_PROVIDERS

validated=0 passed=0
# On a copy, so that nothing of init stays in the tree. The repository's layout is kept: modules name files of deploy/.
cp -r "$modules" "$scratch/terraform"
cp -r "$root/deploy" "$scratch/deploy"
while read -r folder; do
  name=${folder#"$scratch/terraform/"}
  (cd "$folder" && "$tool" init -backend=false -input=false >"$scratch/log" 2>&1) ||
    { cat "$scratch/log" >&2; echo "terraform: init failed in $name" >&2; exit 1; }
  (cd "$folder" && "$tool" validate) || { echo "terraform: validate failed in $name" >&2; exit 1; }
  validated=$((validated + 1))
  [ -d "$folder/tests" ] || continue
  (cd "$folder" && "$tool" test 2>&1) | tee "$scratch/log" || { echo "terraform: tests failed in $name" >&2; exit 1; }
  runs=$(sed -nE 's/^(Success!|Failure!) ([0-9]+) passed, 0 failed.*/\2/p' "$scratch/log")
  [ "${runs:-0}" -gt 0 ] || { echo "terraform: no test ran in $name" >&2; exit 1; }
  passed=$((passed + runs))
done < <(find "$scratch/terraform" -name '*.tf' -printf '%h\n' | sort -u)
echo "terraform: rules=yes fmt=yes validate=$validated test=$passed"
