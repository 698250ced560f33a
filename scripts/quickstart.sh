#!/usr/bin/env bash
# The whole laboratory on the shipped mini grammar: text, samples, downstream data, lookup table, pre-training at three
# sizes, exact loss, trace of the Hessian, linear probes, fine-tuning, report. Sets up .venv.
#     bash scripts/quickstart.sh [FOLDER]      (default: quickstart)
# Safe to interrupt: rerun the same command to resume. A finished run is verified in about a minute.
# QUICKSTART_STEPS (default 1500, a multiple of 3) sets the number of training steps; below 300, all data is smaller, too.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh "$PWD/requirements.txt"
# No hub, no login: nothing here needs a network.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
out=${1:-quickstart}
steps=${QUICKSTART_STEPS:-1500}
sentences=100000 test_sentences=2000 validation=2000 trace_sentences=1024 epochs=30
if [ "$steps" -lt 300 ]; then
    sentences=10000 test_sentences=300 validation=300 trace_sentences=32 epochs=3
fi
rules=rule_mini_mlm.txt
data=$out/data
models=$out/models
length=10 # [CLS], up to 8 words, [SEP]

stage() { printf '\n== %s (%d s so far)\n' "$1" "$SECONDS"; }

train() { # name, hidden size, layers, heads, learning rate
    local final
    final=$models/$1/step$(printf %07d "$steps")
    # A model folder is complete or absent, so its presence is enough, and the launcher's start is saved.
    if [ -f "$final/model.safetensors" ]; then
        echo "complete: $final"
        return
    fi
    deepspeed --master_port "${MASTER_PORT:-32056}" run_pretraining.py --model_type bert-mlm \
        --tokenizer_name bert-large-uncased --hidden_act gelu --hidden_size "$2" --num_hidden_layers "$3" \
        --num_attention_heads "$4" --intermediate_size $((4 * $2)) --hidden_dropout_prob 0 \
        --attention_probs_dropout_prob 0 --encoder_ln_mode pre-ln --lr "$5" --train_batch_size 128 \
        --train_micro_batch_size_per_gpu 128 --lr_schedule step --curve linear --max_steps "$steps" \
        --warmup_proportion 0.06 --gradient_clipping 1.0 --optimizer_type adamw --weight_decay 0.01 --adam_beta1 0.9 \
        --adam_beta2 0.98 --adam_eps 1e-6 --dataset_path "$data/pretraining" --output_dir "$models" --print_steps 250 \
        --num_epochs_between_checkpoints 100000 --job_name "$1" --report_to none --deepspeed --data_loader_type dist \
        --save_steps "0,$((steps / 3)),$((2 * steps / 3))"
}

transfer=(--tokenizer_name bert-large-uncased --max_seq_length $length --do_train --do_eval --weight_decay 0.01
    --max_grad_norm 1.0 --lr_scheduler_type polynomial --warmup_steps 20)
probe=("${transfer[@]}" --per_device_train_batch_size 512 --per_device_eval_batch_size 512 --num_train_epochs 50
    --seeds 0,1,2)
task() { echo --train_file "$data/pcfg_$1.csv" --validation_file "$data/pcfg_$1_validation.csv"; }

stage "1/9 text of $rules"
python generate_pretraining.py --rule-path $rules --save-path "$data" --sentence-num $sentences --shard-num 2 \
    --test-shard-num 1 --test-sentence-num $test_sentences --n_processes 2

stage "2/9 masked samples, one mask per sentence"
python generate_samples.py --dir "$data" -o "$data/pretraining" --dup_factor 1 --vocab_file vocab.txt --do_lower_case 1 \
    --masked_lm_prob 0.15 --max_seq_length $length --model_name bert-large-uncased --max_predictions_per_seq 5 \
    --n_processes 2 --single_mask

stage "3/9 downstream tasks A, B, C, and the lookup table of the test text"
for name in A B C; do
    python generate_downstream.py --rule-path $rules --save-path "$data" --sentence-num 1000 --task-type $name \
        --validation-num $validation
done
python -m pcfg.lookup --rule-path $rules --datafile "$data/test0.txt" --save-path "$data/lookup.hdf5"

stage "4/9 pre-training: small, medium, large"
train small 32 2 2 3e-3
train medium 64 3 4 3e-3
train large 128 3 8 1.5e-3

measured=(--model-path "$models" --datafile "$data/test0.txt" --vocabfile vocab.txt --condprobfile "$data/lookup.hdf5")
stage "5/9 exact loss"
python calculate_loss.py "${measured[@]}"

stage "6/9 trace of the Hessian"
python calculate_hessian.py "${measured[@]}" --nsamples $trace_sentences

stage "7/9 linear probes of the models and of the lookup table"
for name in A B C; do
    # shellcheck disable=SC2046
    python run_lp.py --model_name_or_path "$models" $(task $name) "${probe[@]}" --learning_rate 1e-3
    # Conditionals are far smaller numbers than hidden states: at 1e-3 AdamW would leave their probe unfinished.
    # shellcheck disable=SC2046
    python run_lp.py --features conditional --solver adamw --rule-path $rules --output_dir "$models/lookup_table" $(task $name) \
        "${probe[@]}" --tokenizer_name "$data/pretraining/bert-large-uncased" --learning_rate 1e-1
done

stage "8/9 fine-tuning of the models"
# shellcheck disable=SC2046
python run_ft.py --model_name_or_path "$models" $(task B) "${transfer[@]}" --evaluation_strategy steps --eval_steps 100 \
    --per_device_train_batch_size 128 --gradient_accumulation_steps 1 --per_device_eval_batch_size 128 \
    --learning_rate 1e-4 --num_train_epochs $epochs

stage "9/9 report"
python -m pretraining.report "$models" --output "$out/report"
printf '\nreport: %s (%d s in all)\n' "$out/report/report.html" "$SECONDS"
