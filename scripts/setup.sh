#!/usr/bin/env bash
# Creates .venv if missing and installs the packages that the given files pin. Unchanged files are skipped.
#     bash scripts/setup.sh [REQUIREMENTS ...]        (default: requirements.txt)
# Other scripts source this file, which also puts .venv/bin first in PATH.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

install_requirements() {
    local stamp wanted flags=(--quiet --disable-pip-version-check)
    # By the file's place in the project, however its path is written: a node without network must not install again.
    stamp=$(realpath --relative-to="$root" "$1")
    stamp=$venv/.installed.${stamp//\//_}.sha256
    # A file that says so lists all that it needs: some packages ask for more than they import.
    if grep -q '^# --no-deps' "$1"; then flags+=(--no-deps); fi
    wanted=$(sha256sum <"$1")
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "== installing $1 (a few minutes the first time)"
        "$venv/bin/python" -m pip install "${flags[@]}" -r "$1"
        echo "$wanted" >"$stamp"
    fi
}

if [ ! -x "$venv/bin/python" ] || [ ! -x "$venv/bin/pip" ]; then
    echo "== creating $venv"
    "${PYTHON:-python3}" -m venv "$venv"
fi
for file in "${@:-$root/requirements.txt}"; do
    install_requirements "$file"
done
export PATH=$venv/bin:$PATH
