#!/usr/bin/env bash
# Sets everything up, lints, and runs the whole test suite (arguments go to pytest):
#     bash scripts/test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh "$PWD/requirements.txt" "$PWD/tests/requirements.txt" "$PWD/tests/benchmarks/requirements.txt"
# One thread a process: the launcher's tests start several, and threads that wait for a core spin.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 WANDB_MODE=offline
ruff check .
ruff format --check .
# Each core takes the tests that another hasn't begun: the quickstart alone is minutes of one of them.
python -m pytest -n auto --dist worksteal "$@"
