#!/usr/bin/env bash
# Models of growing size at the same loss: does the balanced trace fall, and does accuracy rise?
#     bash scripts/reproduce_sizes.sh [--scale mini|small|paper] [--out OUT] [--jobs N] [--dry-run]
set -euo pipefail
studies=$(dirname "${BASH_SOURCE[0]}")/studies
exec bash "${studies%/*}/reproduce.sh" "$studies/sizes.toml" "$@"
