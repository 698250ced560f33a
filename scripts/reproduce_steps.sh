#!/usr/bin/env bash
# Training on after the loss has converged: does the trace fall, and does accuracy rise? AdamW, and SGD with a longer warmup.
#     bash scripts/reproduce_steps.sh [--scale mini|small|paper] [--seeds 0,1,2] [--out OUT] [--task A,B,C] [--dry-run]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" steps "$@"
