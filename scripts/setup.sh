#!/usr/bin/env bash
# Creates .venv if it is not there and installs what the given requirements files pin; skipped when they are unchanged.
#     bash scripts/setup.sh [REQUIREMENTS ...]        (default: requirements.txt)
# Other scripts source it, which also puts .venv/bin first in PATH.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

install_requirements() {
    local stamp=$venv/.installed.$(basename "$(dirname "$1")").sha256 wanted
    wanted=$(sha256sum <"$1")
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "== installing $1 (a few minutes the first time)"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$1"
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
