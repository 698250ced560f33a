#!/usr/bin/env bash
# All experiments in one folder; shared models are trained once.
#     bash scripts/reproduce_all.sh [--scale mini|small|paper] [--seeds 0,1,2] [--out OUT] [--task A,B,C] [--dry-run]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/reproduce.sh" all "$@"
