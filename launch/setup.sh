#!/usr/bin/env bash
# Makes .venv in the repository, or reuses it while pyproject.toml and the constraints are the same.
# Run: bash launch/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

constraints="constraints-cpu.txt"
stamp=.venv/.installed
wanted=$(cat pyproject.toml "$constraints" | cksum)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi

python=
for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python=$candidate
        break
    fi
done
if [[ -z $python ]]; then
    echo "setup: no Python of 3.11 or newer found, which the versions in $constraints need; on 3.10: pip install -e ." >&2
    exit 1
fi

echo "setup: installing into .venv ($("$python" --version)); this takes a few minutes" >&2
rm -f "$stamp"
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip install -qq --disable-pip-version-check)
# torch first, by its exact version, because only then does pip choose the CPU wheel where one is offered.
"${pip[@]}" "$(grep '^torch==' "$constraints")"
"${pip[@]}" -c "$constraints" -e '.[dev,rollout]'
echo "$wanted" >"$stamp"
echo "setup: done" >&2
