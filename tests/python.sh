#!/usr/bin/env bash
# Prints the folder of a private Python virtual environment made from tests/requirements/NAME.txt, making it first if the
# list has changed since. Nothing is installed outside target/python/NAME.
#   usage: tests/python.sh NAME
set -euo pipefail
name=${1:?usage: tests/python.sh NAME}
root=$(cd "$(dirname "$0")/.." && pwd)
list="$root/tests/requirements/$name.txt"
venv="${FLATWIRE_PYTHON_DIR:-$root/target/python}/$name"
[ -f "$list" ] || { echo "tests/python.sh: no list $list" >&2; exit 2; }
mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock -w 900 9 || { echo "tests/python.sh: somebody holds $venv.lock for 15 minutes; remove it" >&2; exit 3; }
# An environment knows its own path: one that was moved, or copied with its folder, is made anew.
wanted=$(cat "$list"; echo "# at $venv")
if [ "$wanted" != "$(cat "$venv/made-of.txt" 2>/dev/null)" ]; then
  echo "python: installing $(grep -vc '^#' "$list") packages for $name into a private environment (once)" >&2
  rm -rf "$venv"
  python3 -m venv "$venv" >&2 || { echo "tests/python.sh: python3 -m venv failed; apt-get install python3-venv" >&2; exit 3; }
  "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$list" >&2
  echo "$wanted" >"$venv/made-of.txt"
fi
echo "$venv"
