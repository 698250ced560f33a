#!/usr/bin/env bash
# Training and measurements of prepare_*.sh --small: a tiny model, 20 steps, its loss, its trace, and fine-tuning on labelled
# sentences of the same text.
#     bash scripts/small_run.sh FOLDER TEXT LENGTH [FLAGS of calculate_loss.py and calculate_hessian.py ...]
# FOLDER contains data/ (text) and data/pretraining (samples, tokenizer bert-small). The script creates models/ and sst2/ there.
# TEXT is the file that the loss and the trace are measured on.
set -euo pipefail
folder=$1 text=$2 length=$3
shift 3
[ -d "$folder/sst2" ] || python -m pretraining.sources.examples sst2 "$folder/sst2"
[ -f "$folder/models/small/step0000020/model.safetensors" ] || deepspeed --master_port "${MASTER_PORT:-32056}" \
    run_pretraining.py --model_type bert-mlm --tokenizer_name bert-small --hidden_act gelu --hidden_size 32 \
    --num_hidden_layers 2 --num_attention_heads 2 --intermediate_size 64 --hidden_dropout_prob 0 \
    --attention_probs_dropout_prob 0 --encoder_ln_mode pre-ln --lr 3e-3 --train_batch_size 32 \
    --train_micro_batch_size_per_gpu 32 --lr_schedule step --curve linear --max_steps 20 --warmup_proportion 0.1 \
    --optimizer_type adamw --dataset_path "$folder/data/pretraining" --output_dir "$folder/models" --job_name small \
    --print_steps 10 --report_to none --deepspeed --data_loader_type dist --do_validation
measured=(--model-path "$folder/models" --datafile "$text" --vocabfile "$folder/data/vocab.txt" "$@")
python calculate_loss.py "${measured[@]}"
python calculate_hessian.py "${measured[@]}" --nsamples 64
python run_ft.py --model_name_or_path "$folder/models" --task_name sst2 --train_file "$folder/sst2/train.csv" \
    --validation_file "$folder/sst2/validation.csv" --tokenizer_name bert-small --max_seq_length "$length" --do_train --do_eval \
    --per_device_train_batch_size 64 --per_device_eval_batch_size 64 --learning_rate 1e-3 --num_train_epochs 1
python -m pretraining.report "$folder/models" --output "$folder/report"
