#!/usr/bin/env bash
# Common entry point of reproduce_*.sh: sets up .venv and runs study files of scripts/studies/.
#     bash scripts/reproduce.sh scripts/studies/steps.toml [...] [--scale mini|small|paper] [--out OUT] [--dry-run]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup.sh" "$root/requirements.txt"
scale=mini out=
words=("$@")
for ((i = 0; i < $#; i++)); do
    case ${words[i]} in
    --scale) scale=${words[i + 1]-} ;;
    --scale=*) scale=${words[i]#*=} ;;
    --out | --out=*) out=given ;;
    esac
done
[ -n "$out" ] || words+=(--out "reproduction_$scale")
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec python -m pretraining.experiments "${words[@]}"
