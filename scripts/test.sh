#!/usr/bin/env bash
# Sets up .venv, lints, checks types, and runs the whole test suite. Arguments go to pytest.
#     bash scripts/test.sh
#     LONG_TESTS=1 bash scripts/test.sh       the same checks with more repetitions: kills, random grammars, reruns
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh "$PWD/requirements.txt" "$PWD/tests/requirements.txt" "$PWD/tests/benchmarks/requirements.txt"
# One thread per process: several processes share the cores, and waiting threads spin.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 WANDB_MODE=offline
ruff check .
ruff format --check .
mypy
# A core without tests takes over those that another core has not started.
python -m pytest -n auto --dist worksteal --durations 10 "$@"
