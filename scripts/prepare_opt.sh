#!/usr/bin/env bash
# Text of OPT-125M restricted to its 2,000 most frequent tokens, masked samples, and the lookup table of a part of its test text.
# Sets up .venv.
#     HF_HUB_OFFLINE=0 bash scripts/prepare_opt.sh [FOLDER]     (default: opt_dataset; downloads the model)
#     bash scripts/prepare_opt.sh --small [FOLDER]              (default: opt_small; no network: a tiny random OPT, then 20
#                                                               training steps, loss, trace and fine-tuning)
# MODEL=FOLDER uses a local model. Safe to interrupt: rerun the same command to resume.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh "$PWD/requirements.txt"
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
if [ "${1:-}" = --small ]; then
    folder=${2:-opt_small}
    model=${MODEL:-$folder/model}
    [ -d "$model" ] || python -m pretraining.sources.examples opt "$model"
    text=(--top-tokens 200 --frequency-sentences 500 --length-limit 10 --sentence-num 1000 --shard-num 1 --test-sentence-num 50 --test-shard-num 1)
    samples=(--max_seq_length 11 --model_name bert-small)
    table=()
    data=$folder/data
else
    folder=${1:-opt_dataset}
    model=${MODEL:-facebook/opt-125m}
    text=(--top-tokens 2000 --length-limit 24)
    samples=(--max_seq_length 25 --model_name opt-pieces)
    table=(--max-sentences 1000 --positions-per-sentence 2)
    data=$folder
fi
python generate_pretraining.py --source opt --model-name "$model" --save-path "$data" "${text[@]}"
python generate_samples.py --dir "$data" -o "$data/pretraining" --vocab_file vocab.txt --do_lower_case 0 --single_mask "${samples[@]}"
python -m pretraining.sources.opt.lookup --data-path "$data" --model-name "$model" --datafile "$data/test0.txt" \
    --save-path "$data/lookup.hdf5" "${table[@]}"
if [ "${1:-}" = --small ]; then
    bash scripts/small_run.sh "$folder" "$data/test0.txt" 32 --condprobfile "$data/lookup.hdf5"
fi
