#!/usr/bin/env bash
# Text and masked samples of BookCorpus (74 million sentences, 5 GB); see scripts/prepare_corpus.sh.
#     HF_HUB_OFFLINE=0 bash scripts/prepare_bookcorpus.sh [FOLDER]      bash scripts/prepare_bookcorpus.sh --small [FOLDER]
set -euo pipefail
exec bash "$(dirname "$0")/prepare_corpus.sh" bookcorpus "$@"
