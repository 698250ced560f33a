#!/usr/bin/env bash
# Pre-trains the front page's model (201 million parameters) with DeepSpeed. Sets up .venv.
#     bash scripts/pretrain.sh pcfg_dataset/pretraining OUT JOB [FLAGS of run_pretraining.py ...]
# Later flags win: `... --hidden_size 256 --num_hidden_layers 4 --num_attention_heads 4` trains a smaller model.
# Default: one rank per GPU of this machine, or one rank without a GPU. NUM_RANKS=2 sets the number. HOSTFILE=hosts.txt uses the
# machines listed there (one line per machine, "node1 slots=8"); they need the same folders at the same paths, and ssh without a
# password. Safe to interrupt: rerun the same command to resume. SIGTERM and Ctrl-C save the state first.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "pretrain.sh: error: needs the folder of samples, the output folder and the job's name; see the head of $0" >&2
    exit 2
fi
samples=$1 output=$2 job=$3
shift 3
root=$(cd "$(dirname "$0")/.." && pwd)
source "$root/scripts/setup.sh" "$root/requirements.txt"
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} WANDB_MODE=${WANDB_MODE:-offline} TOKENIZERS_PARALLELISM=false

ranks=()
[ -z "${HOSTFILE:-}" ] || ranks=(--hostfile "$HOSTFILE")
[ -z "${NUM_RANKS:-}" ] || ranks+=(--num_gpus "$NUM_RANKS")
exec deepspeed --master_port "${MASTER_PORT:-32056}" "${ranks[@]}" "$root/run_pretraining.py" --model_type bert-mlm \
    --tokenizer_name bert-large-uncased --hidden_act gelu --hidden_size 1024 --num_hidden_layers 16 \
    --num_attention_heads 16 --intermediate_size 4096 --hidden_dropout_prob 0.1 --attention_probs_dropout_prob 0.1 \
    --encoder_ln_mode pre-ln --lr 5e-4 --train_batch_size 4096 --train_micro_batch_size_per_gpu 1024 --lr_schedule time \
    --curve linear --warmup_proportion 0.20 --gradient_clipping 0.0 --optimizer_type adamw --weight_decay 0.01 \
    --adam_beta1 0.9 --adam_beta2 0.98 --adam_eps 1e-6 --dataset_path "$samples" --output_dir "$output" --print_steps 100 \
    --num_epochs_between_checkpoints 100000 --job_name "$job" --validation_epochs 3 --validation_epochs_begin 1 \
    --validation_epochs_end 1 --validation_begin_proportion 0.05 --validation_end_proportion 0.01 \
    --validation_micro_batch 16 --deepspeed --data_loader_type dist --do_validation --fp16 "$@"
