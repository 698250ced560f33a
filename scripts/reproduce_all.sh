#!/usr/bin/env bash
# All studies of the mini language in one folder; shared models are trained once.
#     bash scripts/reproduce_all.sh [--scale mini|small|paper] [--out OUT] [--jobs N] [--dry-run]
set -euo pipefail
studies=$(dirname "${BASH_SOURCE[0]}")/studies
exec bash "${studies%/*}/reproduce.sh" "$studies"/{steps,sizes,algorithms,learning_rates,sam}.toml "$@"
