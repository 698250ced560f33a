#!/usr/bin/env bash
# The smallest honest study, from text to report: scripts/studies/quickstart.toml on the shipped grammar. Sets up .venv.
#     bash scripts/quickstart.sh [FOLDER]      (default: quickstart, in the repository's root)
# Safe to interrupt: rerun the same command to resume. A finished run is verified in less than a minute.
# QUICKSTART_SCALE=test has 2 seeds and 20 steps: it takes a minute and says nothing about models.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh "$PWD/requirements.txt"
out=${1:-quickstart}
# No hub, no login: nothing here needs a network.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
python -m pretraining.experiments scripts/studies/quickstart.toml --scale "${QUICKSTART_SCALE:-mini}" --out "$out"
printf '\nreport:  %s\npicture: %s (%d s in all)\n' "$out/report/report.html" "$out/report/overview.png" "$SECONDS"
