#!/usr/bin/env bash
# Common entry point of reproduce_*.sh: sets up .venv and starts the experiment that the first argument names.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/scripts/setup.sh" "$root/requirements.txt"
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec python -m pretraining.experiments.reproduce "$@"
