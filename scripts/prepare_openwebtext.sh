#!/usr/bin/env bash
# Text and masked samples of OpenWebText (8 million documents, 40 GB); see scripts/prepare_corpus.sh.
#     HF_HUB_OFFLINE=0 bash scripts/prepare_openwebtext.sh [FOLDER]      bash scripts/prepare_openwebtext.sh --small [FOLDER]
set -euo pipefail
exec bash "$(dirname "$0")/prepare_corpus.sh" openwebtext "$@"
