#!/usr/bin/env bash
# More training after the loss has converged, by AdamW and by SGD: does the trace fall, and does accuracy rise?
#     bash scripts/reproduce_steps.sh [--scale mini|small|paper] [--out OUT] [--jobs N] [--dry-run]
set -euo pipefail
studies=$(dirname "${BASH_SOURCE[0]}")/studies
exec bash "${studies%/*}/reproduce.sh" "$studies/steps.toml" "$@"
