#!/usr/bin/env bash
# Checks every CUDA path of the project on a machine with one GPU, in at most 8 minutes after the set-up of .venv: a table of
# what is expected and measured, with verdicts. Exit code 0: all is as expected; 1: something is not; 2: no GPU.
#     bash scripts/check_gpu.sh [ARGUMENTS ...]      (--help lists them)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh "$PWD/requirements.txt"
export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec python tests/check_gpu.py "$@"
