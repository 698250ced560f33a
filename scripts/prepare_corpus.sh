#!/usr/bin/env bash
# Text, WordPiece vocabulary and masked samples of a corpus of documents. Sets up .venv.
#     HF_HUB_OFFLINE=0 bash scripts/prepare_corpus.sh openwebtext|bookcorpus [FOLDER]      (default: openwebtext_dataset, ...)
#     bash scripts/prepare_corpus.sh openwebtext|bookcorpus --small [FOLDER]               (default: openwebtext_small, ...)
# The first form downloads the data set from the hub; DATASET=PATH uses local files instead. --small needs no network: it takes
# docstrings of Python's library in the same layout, then runs 20 training steps, loss, trace and fine-tuning.
# Safe to interrupt: rerun the same command to resume.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 small=${2:-}
source scripts/setup.sh "$PWD/requirements.txt"
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
if [ "$small" = --small ]; then
    folder=${3:-${name}_small}
    dataset=${DATASET:-$folder/source}
    [ -d "$dataset" ] || python -m pretraining.sources.examples "$name" "$dataset"
    data=$folder/data
    text=(--vocab-size 1000 --shard-num 2 --test-shard-num 1 --test-fraction 0.1)
    samples=(--max_seq_length 64 --max_predictions_per_seq 10 --model_name bert-small)
else
    folder=${2:-${name}_dataset}
    dataset=${DATASET:-$name}
    data=$folder
    text=()
    samples=(--max_seq_length 512 --max_predictions_per_seq 77 --short_seq_prob 0.1 --dup_factor 1)
fi
python generate_pretraining.py --source corpus --dataset "$dataset" --save-path "$data" "${text[@]}"
python generate_samples.py --dir "$data" -o "$data/pretraining" --vocab_file vocab.txt "${samples[@]}"
if [ "$small" = --small ]; then
    bash scripts/small_run.sh "$folder" "$data/pretraining/test_shard_0.hdf5" 64
fi
