#!/usr/bin/env bash
# Models of growing size at the same loss, in the parameters of the largest: does the trace fall, and does accuracy rise?
#     bash scripts/reproduce_sizes.sh [--scale mini|small|paper] [--seeds 0,1,2] [--out OUT] [--task A,B,C] [--dry-run]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" sizes "$@"
