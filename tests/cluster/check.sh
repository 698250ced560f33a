#!/usr/bin/env bash
# Clusters as they are: SLURM, ssh with pdsh, and Ray on two hosts, which are namespaces of this machine (hosts.sh).
#     bash tests/cluster/check.sh        (root; Debian's slurm-wlm munge pdsh openssh-server iproute2; at most 25 minutes)
# Prints a verdict per check, and exits with 1 if one failed, with 2 where packages or namespaces are missing.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/tests/cluster/hosts.sh"
if [ -n "$(missing)" ]; then
    missing | sed 's/^/check.sh: needs /' >&2
    exit 2
fi
bash "$root/scripts/setup.sh" "$root/requirements.txt" "$root/tests/requirements.txt" || exit
lab=$(mktemp -d /var/tmp/cluster.XXXXXX)
python=$root/.venv/bin/python
small=(--tokenizer_name bert-large-uncased --dataset_path "$lab/my samples" --hidden_size 32 --num_hidden_layers 2
    --num_attention_heads 2 --intermediate_size 64 --lr 1e-3 --train_batch_size 64 --train_micro_batch_size_per_gpu 16
    --lr_schedule step --print_steps 5 --report_to none --output_dir "$lab/out/models")

verdict() { # NAME, then a command that says whether it is so, or true and false
    local name=$1 answer=FAILED
    shift
    if "$@"; then answer=ok; fi
    printf '%-6s  %4d s  %s\n' "$answer" "$SECONDS" "$name" | tee -a "$lab/verdicts"
}

seen() { # FILE PATTERN SECONDS: whether a line appears in time
    local deadline=$((SECONDS + $3))
    until grep -qE "$2" "$1" 2>/dev/null; do
        [ $SECONDS -lt $deadline ] || return 1
        sleep 0.3
    done
}

batch() { # NAME FLAGS-OF-SBATCH -- FLAGS: submits a run of a rank per node; prints its number. The log is out/NUMBER.log
    local name=$1 flags=()
    shift
    while [ "$1" != -- ]; do
        flags+=("$1")
        shift
    done
    on nodea env REQUEUE="${REQUEUE:-}" sbatch --parsable --gpus-per-node 0 --ntasks-per-node 1 --cpus-per-task 1 --time 30 \
        -o "$lab/out/%j.log" "${flags[@]}" scripts/pretrain_slurm.sbatch "${small[@]}" --job_name "$name" "${@:2}"
}

ended() { # JOB SECONDS: whether it neither runs nor ends within that time
    local deadline=$((SECONDS + $2))
    while on nodea squeue -h -j "$1" -o %T 2>/dev/null | grep -qE 'RUNNING|COMPLETING'; do
        [ $SECONDS -lt $deadline ] || return 1
        sleep 0.5
    done
}

state_of() { sed -n 's/^SIGTERM at .*; training state: //p' "$lab/out/$1.log" | tail -n 1; }
job_state() { on nodea scontrol show job "$1" | grep -oE "$2=\S+" | cut -d= -f2; }

# 20 SIGTERMs to one run, each in a job of its own, which goes on from the state of the job before.
check_sigterm() {
    local how job before="" saved=0 resumed=0 codes="" log ways=(limit limit)
    for how in 1 2 3 4 5 6 7; do ways+=(ask cancel); done
    ways+=(preempt preempt requeue requeue)
    for how in "${ways[@]}" last; do
        case $how in
        limit) job=$(batch chain --time 2 --signal=TERM@60 -- --max_steps 1000000) ;;
        *) job=$(batch chain -- --max_steps 1000000) ;;
        esac
        log=$lab/out/$job.log
        seen "$log" '^step ' 180 || break
        [ -z "$before" ] || ! grep -qF "going on from $before" "$log" || resumed=$((resumed + 1))
        case $how in
        ask) on nodea scancel --signal=TERM "$job" ;;
        cancel) on nodea scancel "$job" ;;
        preempt) on nodea sbatch -p urgent --nodes 2 --exclusive --time 1 -o /dev/null --wrap 'sleep 3' >/dev/null ;;
        requeue) on nodea scontrol requeue "$job" ;;
        last)
            on nodea scancel "$job"
            ended "$job" 60
            break
            ;;
        esac
        ! seen "$log" '; training state: ' 150 || saved=$((saved + 1))
        ended "$job" 60 || true
        [ "$how" != ask ] || codes+="$(job_state "$job" ExitCode) "
        on nodea scancel "$job" 2>/dev/null || true
        before=$(state_of "$job")
    done
    verdict "1, 2: $saved of 20 SIGTERMs saved (2 time limit, 14 scancel, 2 preemption, 2 requeue)" [ "$saved" = 20 ]
    verdict "1, 2: $resumed of 20 resumed from the step that they had reached" [ "$resumed" = 20 ]
    verdict "7: a saved job ends with 0" [ "$codes" = "0:0 0:0 0:0 0:0 0:0 0:0 0:0 " ]
}

# REQUEUE=1: the job asks for itself again, goes on, and appends to its log.
check_requeue() {
    local job log
    job=$(REQUEUE=1 batch again -- --max_steps 1000000)
    log=$lab/out/$job.log
    seen "$log" '^step ' 180
    on nodea scancel --signal=TERM "$job"
    verdict "7: REQUEUE=1 requeues a saved job, which goes on and appends to its log" \
        seen "$log" "going on from $lab/out/models/again/training_state" 300
    on nodea scancel "$job"
    seen "$log" 'CANCELLED|; training state' 60 || true
    ended "$job" 60
    verdict "7: a cancelled job stays cancelled" [ "$(job_state "$job" JobState)" = CANCELLED ]
}

# A rank that is killed ends the job; the next one gives the weights of an undisturbed run.
check_kill() {
    local zero job name
    for zero in 0 1; do
        local flags=(--zero_stage "$zero" --max_steps 400 --save_steps '100,200,300' --num_epochs_between_checkpoints 1000)
        for name in whole "killed"; do
            job=$(batch "$name$zero" -- "${flags[@]}")
            if [ "$name" = killed ]; then
                seen "$lab/out/$job.log" '^step 2[0-9][0-9]/' 180 || true
                on nodeb pkill -KILL -f "job_name killed$zero"
                ended "$job" 90
                verdict "a job whose rank is killed fails" [ "$(job_state "$job" JobState)" = FAILED ]
                job=$(batch "killed$zero" -- "${flags[@]}")
            fi
            seen "$lab/out/$job.log" '^model: ' 180 || true
            ended "$job" 60
        done
        verdict "SIGKILL of a rank at ZeRO $zero resumes to the undisturbed weights" \
            cmp "$lab/out/models/"{whole,killed}"$zero/step0000400/model.safetensors"
    done
}

check_array() {
    local job
    job=$(batch seed%a --array 0-1 -- --seed %a --max_steps 10)
    deadline=$((SECONDS + 240))
    until [ -e "$lab/out/models/seed1/step0000010/args.json" ] && [ -e "$lab/out/models/seed0/step0000010/args.json" ]; do
        [ $SECONDS -lt $deadline ] || break
        sleep 1
    done
    verdict "8: an array job trains a seed per task" \
        grep -q '"seed": 1' "$lab/out/models/seed1/step0000010/args.json"
}

# Tasks see their numbers, GPUs and cores.
check_tasks() {
    local flags printed wanted
    mkdir -p "$lab/show/.venv/bin"
    ln -sf /bin/bash "$lab/show/.venv/bin/python"
    cat >"$lab/show/show" <<'END'
echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $SLURM_CPUS_PER_TASK $SLURM_CPUS_ON_NODE $MASTER_ADDR $CUDA_VISIBLE_DEVICES
END
    sed '/^set -euo/,$d' "$root/scripts/pretrain_slurm.sbatch" >"$lab/out/show.sbatch"
    printf 'source %q\nroot=%q\nranks show\n' "$root/scripts/slurm_ranks.sh" "$lab/show" >>"$lab/out/show.sbatch"
    while read -r flags wanted; do
        # shellcheck disable=SC2086
        on nodea sbatch --wait ${flags//_/ } -o "$lab/out/show$flags.log" "$lab/out/show.sbatch" >/dev/null
        printed=$(sort -n "$lab/out/show$flags.log" | tail -n 1)
        verdict "4, 7: sbatch ${flags//_/ }: the last of $wanted (rank, local rank, ranks, per node, cores, cores of the node, master, GPUs)" \
            [ "$printed" = "$wanted" ]
    done <<END
--nodes_2 15 7 16 8 8 64 nodea 0,1,2,3,4,5,6,7
--gpus-per-node_4_--ntasks-per-node_4 7 3 8 4 8 32 nodea 0,1,2,3
--gpus-per-node_0_--ntasks-per-node_2_--cpus-per-task_16 3 1 4 2 16 32 nodea
END
}

hostfile() { # NAME HOSTS FLAGS: scripts/pretrain.sh on nodea; the output is in out/NAME.txt
    local name=$1
    # shellcheck disable=SC2086
    printf '%s slots=1\n' $2 >"$lab/out/$name.hosts"
    on nodea env HOSTFILE="$lab/out/$name.hosts" WANDB_MODE=disabled WANDB_API_KEY=secret GLOO_SOCKET_IFNAME=eth0 \
        MASTER_PORT="${port:-32056}" bash scripts/pretrain.sh "$lab/my samples" "$lab/out/my models" "$name" \
        "${small[@]:4:14}" --lr_schedule step --print_steps 5 --report_to none "${@:3}" >"$lab/out/$name.txt" 2>&1
}

check_hostfile() {
    local begun=$SECONDS folder="$lab/out/my models/two"
    hostfile off "nodea nowhere" || true
    verdict "5: an unreachable host is refused in $((SECONDS - begun)) s" \
        grep -q 'error: HOSTFILE .*: nowhere: ssh fails' "$lab/out/off.txt"
    verdict "5: two hosts train over ssh, in folders with spaces" hostfile two "nodea nodeb" --max_steps 20
    verdict "5: a log per rank" [ "$(find "$folder/logs" -name '*_rank[01].log' | wc -l)" = 2 ]
    verdict "5: the environment reaches the ranks, secrets do not" \
        bash -c "grep -q GLOO_SOCKET_IFNAME=eth0 '$folder/environment' && ! grep -qi secret '$folder/environment'"
}

# Only waits, for 3 minutes: the rank of nodeb is killed before it meets the other one.
check_meeting() {
    local begun=$SECONDS job=0
    port=32099 hostfile alone "nodea nodeb" --max_steps 20 &
    job=$!
    until on nodeb pkill -KILL -f 'local_rank=0.*job_name alone'; do sleep 0.1; done
    wait "$job" || true
    verdict "5: a rank that dies before the ranks meet is named after $((SECONDS - begun)) s (at most 300)" bash -c \
        "[ $((SECONDS - begun)) -lt 300 ] && tail -n 1 '$lab/out/alone.txt' | grep -q 'of 2 ranks, rank1 did not come'"
}

# Launchers and programs that do or do not share their work.
check_launchers() {
    local torchrun=("$root/.venv/bin/torchrun" --nproc_per_node 2 --standalone) loss
    loss=(calculate_loss.py --model-path "$lab/out/my models/two" --datafile "$lab/data/test0.txt"
        --vocabfile "$lab/data/vocab.txt" --rule-path rule_mini_mlm.txt --batch-size 20)
    on nodea "$python" "${loss[@]}" --records-path "$lab/out/loss1" >"$lab/out/loss.txt" 2>&1 || true
    on nodea "${torchrun[@]}" "${loss[@]}" --records-path "$lab/out/loss2" >>"$lab/out/loss.txt" 2>&1 || true
    verdict "8: two ranks of torchrun measure the loss of one process" \
        bash -c "cd '$lab/out' && diff <(grep -v seconds loss1/step*/loss.json) <(grep -v seconds loss2/step*/loss.json) >&2"
    on nodea "${torchrun[@]}" generate_samples.py --dir "$lab/data" -o "$lab/out/never" --vocab_file vocab.txt \
        >"$lab/out/never.txt" 2>&1 || true
    verdict "8: torchrun generate_samples.py is refused" \
        bash -c "grep -q 'error: WORLD_SIZE 2: its work is not shared' '$lab/out/never.txt' && [ ! -e '$lab/out/never' ]"
}

generate() { # FOLDER FLAGS: text shards of the mini grammar, on nodea
    on nodea "$python" generate_pretraining.py --rule-path rule_mini_mlm.txt --save-path "$1" --sentence-num 600 --shard-num 6 \
        --test-shard-num 1 --test-sentence-num 200 --seed 1 "${@:2}"
}

check_ray() {
    local ray=(env RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled "$root/.venv/bin/ray") begun address pattern
    local one=(--num-cpus 1 --disable-usage-stats --object-store-memory 100000000)
    on nodea "${ray[@]}" start --head --node-ip-address 10.77.0.1 --port 6379 --include-dashboard=false "${one[@]}" \
        >"$lab/log/ray" 2>&1 </dev/null
    on nodeb "${ray[@]}" start --address 10.77.0.1:6379 --node-ip-address 10.77.0.2 "${one[@]}" \
        >>"$lab/log/ray" 2>&1 </dev/null
    generate "$lab/out/ray" --executor ray --ray-address nodea:6379 >"$lab/out/ray.txt" 2>&1
    verdict "6: two nodes of Ray make text shards" [ $? = 0 ]
    generate "$lab/out/local" --n_processes 1 >>"$lab/out/ray.txt" 2>&1
    verdict "6: with the bytes of one process" diff -r -x '*.json' "$lab/out/ray" "$lab/out/local"
    # /tmp is each host's own.
    generate /tmp/own --executor ray --ray-address nodea:6379 >"$lab/out/own.txt" 2>&1 || true
    verdict "6: a folder that the nodes do not share is an error" \
        grep -q 'error: /tmp/own/.*: was made elsewhere and is not here' "$lab/out/own.txt"
    on nodeb "${ray[@]}" stop --force >>"$lab/log/ray" 2>&1 || true
    while read -r host address pattern; do
        begun=$SECONDS
        on "$host" "$python" generate_pretraining.py --rule-path rule_mini_mlm.txt --save-path "$lab/out/none" --shard-num 1 \
            --executor ray --ray-address "$address" >"$lab/out/address.txt" 2>&1 || true
        verdict "6: --ray-address $address on $host is refused in $((SECONDS - begun)) s (at most 60)" \
            bash -c "[ $((SECONDS - begun)) -lt 60 ] && grep -q 'no Ray cluster to join there .$pattern' '$lab/out/address.txt'"
    done <<END
nodea nodea:22 something else listens
nodea nodea not HOST:PORT
nodeb nodea:6379 it answers, but does not run on this machine
END
    on nodea "${ray[@]}" stop --force >>"$lab/log/ray" 2>&1 || true
}

configure
trap down EXIT
up
echo "two hosts after $SECONDS s; their files are in $lab"
"$python" "$root/generate_pretraining.py" --rule-path rule_mini_mlm.txt --save-path "$lab/data" --sentence-num 600 \
    --shard-num 2 --test-shard-num 1 --test-sentence-num 200 --seed 1 --n_processes 1 >"$lab/out/data.txt" 2>&1
"$python" "$root/generate_samples.py" --dir "$lab/data" -o "$lab/my samples" --vocab_file vocab.txt --max_seq_length 16 \
    --model_name bert-large-uncased --single_mask --n_processes 1 >>"$lab/out/data.txt" 2>&1

for name in "${@:-all}"; do
    if [ "$name" != all ]; then
        "check_$name"
        continue
    fi
    check_tasks
    check_requeue &
    requeue=$!
    check_hostfile
    check_meeting &
    meeting=$!
    check_launchers
    check_ray
    wait "$requeue" "$meeting"
    check_array
    check_kill
    check_sigterm
done
echo "$(grep -c ^ok "$lab/verdicts") of $(wc -l <"$lab/verdicts") checks passed in $((SECONDS / 60)) minutes"
if grep ^FAILED "$lab/verdicts"; then
    echo "see $lab"
    exit 1
fi
rm -rf "$lab"
