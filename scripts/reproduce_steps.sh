#!/usr/bin/env bash
# More training after the loss has converged, by AdamW, and by SGD with a longer warmup: does the trace fall, and does accuracy
# rise?
#     bash scripts/reproduce_steps.sh [--scale mini|small|paper] [--seeds 0,1,2] [--out OUT] [--task A,B,C] [--dry-run]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" steps "$@"
