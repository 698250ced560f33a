#!/usr/bin/env bash
# Pre-trains the front page's model (201 million parameters) with DeepSpeed. Sets up .venv.
#     bash scripts/pretrain.sh pcfg_dataset/pretraining OUT JOB [FLAGS of run_pretraining.py ...]
# Later flags win: `... --hidden_size 256 --num_hidden_layers 4 --num_attention_heads 4` trains a smaller model.
# Default: one rank per GPU of this machine, or one rank without a GPU. NUM_RANKS=2 sets the number. HOSTFILE=hosts.txt uses the
# machines listed there (one line per machine, "node1 slots=8"); see scripts/README.md, "Clusters". Safe to interrupt: rerun the
# same command to resume. SIGTERM and Ctrl-C save the state first.
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
start=(exec deepspeed)

fail() {
    echo "pretrain.sh: error: $1" >&2
    exit 2
}

# Refuses a hostfile whose machines can not start ranks; else sets what starts them there.
use_hosts() {
    local host hosts=() needed name status
    [ -f "$HOSTFILE" ] || fail "HOSTFILE $HOSTFILE: no such file"
    while read -r host _; do
        [[ -z $host || $host = \#* ]] || hosts+=("$host")
    done <"$HOSTFILE"
    ranks=(--hostfile "$HOSTFILE")
    [ ${#hosts[@]} -gt 1 ] || return 0
    command -v pdsh >/dev/null || fail "HOSTFILE $HOSTFILE: DeepSpeed starts ranks on several machines by pdsh; install it"
    [[ $root$PWD != *\ * ]] || fail "HOSTFILE $HOSTFILE: pdsh needs folders without spaces for the project and for $PWD"
    needed=$(printf 'test -d %q && test -d %q && test -x %q' "$PWD" "$(realpath -m "$samples")" "$root/.venv/bin/python")
    for host in "${hosts[@]}"; do
        status=0
        ssh -n -oBatchMode=yes -oConnectTimeout=10 "$host" "$needed" >/dev/null 2>&1 || status=$?
        [ "$status" != 255 ] || fail "HOSTFILE $HOSTFILE: $host: ssh fails; try: ssh -oBatchMode=yes $host true"
        [ "$status" = 0 ] || fail "HOSTFILE $HOSTFILE: $host: lacks $PWD, $samples or $root/.venv; give it the same folders"
    done
    # The ranks get these variables, and no secrets.
    mkdir -p "$output/$job"
    DS_ENV_FILE=$(realpath "$output/$job")/environment
    for name in $(compgen -e); do
        case $name in
        HF_HUB_OFFLINE | HF_HOME | WANDB_MODE | TOKENIZERS_PARALLELISM | OMP_* | GLOO_* | NCCL_*) echo "$name=${!name}" ;;
        esac
    done >"$DS_ENV_FILE"
    export DS_ENV_FILE PDSH_SSH_ARGS_APPEND="-oBatchMode=yes -oConnectTimeout=10 -oServerAliveInterval=30"
    logs=${DS_ENV_FILE%/*}/logs/$(date +%Y%m%d-%H%M%S)
    mkdir -p "$logs"
    ranks+=(--enable_each_rank_log "$(printf %q "$logs")")
    [ -z "${MASTER_ADDR:-}" ] || ranks+=(--master_addr "$MASTER_ADDR")
    start=(on_hosts deepspeed)
}

# Runs the launcher, shows the output of rank 0, and in the end the first error of any rank.
on_hosts() {
    local status=0 asked="" follower
    source "$root/scripts/slurm_ranks.sh"
    echo "the output of each rank: $logs"
    (until compgen -G "$logs/*_rank0.log" >/dev/null; do sleep 0.5; done && exec tail -n +1 -f "$logs"/*_rank0.log) &
    follower=$!
    # shellcheck disable=SC2016
    await 'asked=yes; kill -TERM "$child"' "$@" || status=$?
    sleep 1
    kill "$follower" 2>/dev/null || true
    if [ -n "$asked" ]; then
        echo "the ranks save their state within 30 s; see $logs" >&2
    elif [ "$status" != 0 ]; then
        echo "pretrain.sh: error: a rank failed: $(grep -hE 'error: |Error: ' "$logs"/*.log | head -n 1)" >&2
    fi
    exit "$status"
}

[ -z "${HOSTFILE:-}" ] || use_hosts
[ -z "${NUM_RANKS:-}" ] || ranks+=(--num_gpus "$NUM_RANKS")
"${start[@]}" --master_port "${MASTER_PORT:-32056}" "${ranks[@]}" "$root/run_pretraining.py" --model_type bert-mlm \
    --tokenizer_name bert-large-uncased --hidden_act gelu --hidden_size 1024 --num_hidden_layers 16 \
    --num_attention_heads 16 --intermediate_size 4096 --hidden_dropout_prob 0.1 --attention_probs_dropout_prob 0.1 \
    --encoder_ln_mode pre-ln --lr 5e-4 --train_batch_size 4096 --train_micro_batch_size_per_gpu 1024 --lr_schedule time \
    --curve linear --warmup_proportion 0.20 --gradient_clipping 0.0 --optimizer_type adamw --weight_decay 0.01 \
    --adam_beta1 0.9 --adam_beta2 0.98 --adam_eps 1e-6 --dataset_path "$samples" --output_dir "$output" --print_steps 100 \
    --num_epochs_between_checkpoints 100000 --job_name "$job" --validation_epochs 3 --validation_epochs_begin 1 \
    --validation_epochs_end 1 --validation_begin_proportion 0.05 --validation_end_proportion 0.01 \
    --validation_micro_batch 16 --deepspeed --data_loader_type dist --do_validation --fp16 "$@"
