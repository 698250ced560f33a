#!/usr/bin/env bash
# Standard and adversarial pre-training: does accuracy differ at the same loss?
#     bash scripts/reproduce_algorithms.sh [--scale mini|small|paper] [--out OUT] [--jobs N] [--dry-run]
set -euo pipefail
studies=$(dirname "${BASH_SOURCE[0]}")/studies
exec bash "${studies%/*}/reproduce.sh" "$studies/algorithms.toml" "$@"
