#!/usr/bin/env bash
# Standard and adversarial pre-training and the lookup table: does accuracy differ at the same loss?
#     bash scripts/reproduce_algorithms.sh [--scale mini|small|paper] [--seeds 0,1,2] [--out OUT] [--task A,B,C] [--dry-run]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" algorithms "$@"
