#!/usr/bin/env bash
# One rank per GPU, or SLURM_NTASKS_PER_NODE ranks per node without GPUs, over all nodes of a SLURM job. Runs inside the job.
#     bash scripts/slurm_ranks.sh run_pretraining.py FLAGS ...
# As a launcher of studies: --launcher "bash scripts/slurm_ranks.sh". The batch files *_slurm.sbatch source it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# await STOP COMMAND ...: runs a command in a session of its own, where signals to this one do not reach it. SIGTERM evaluates
# STOP, which asks the command (process $child) to end, and its end is waited for.
await() {
    local stop=$1 child status=0
    setsid "${@:2}" &
    child=$!
    # shellcheck disable=SC2064
    trap "$stop || true" TERM INT
    wait "$child" || true
    while kill -0 "$child" 2>/dev/null; do # a signal has ended the wait
        wait "$child" || true
    done
    wait "$child" || status=$?
    trap - TERM INT
    return "$status"
}

# ranks SCRIPT FLAGS ...: srun answers SIGTERM by killing its tasks, so that scancel asks them instead.
ranks() {
    local nodes number=${SLURM_GPUS_ON_NODE:-0} cores gpus=()
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # one per line; `head` would close the pipe before scontrol ends
    if [ "$number" -gt 0 ]; then
        gpus=(--gpus-per-node="$number")
    else
        number=${SLURM_NTASKS_PER_NODE:-1}
    fi
    cores=$((${SLURM_CPUS_ON_NODE:-1} / number))
    cores=$((cores > 0 ? cores : 1))
    export MASTER_ADDR=${nodes%%$'\n'*} MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    export LOCAL_WORLD_SIZE=$number
    # The numbers of a rank differ from task to task, so they are looked up there and not here.
    # shellcheck disable=SC2016
    await 'scancel --signal=TERM "$SLURM_JOB_ID"' srun --kill-on-bad-exit=1 --ntasks=$((number * SLURM_JOB_NUM_NODES)) \
        --ntasks-per-node="$number" --cpus-per-task="$cores" "${gpus[@]}" \
        bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' - \
        "$root/.venv/bin/python" "$root/$1" "${@:2}"
}

# run_job PATTERN COMMAND ...: runs the command of a batch file, and exits as it does. After SIGTERM (code 143) with a line of
# output that PATTERN matches, it requeues the job with REQUEUE=1, and else exits with 0: nothing has failed, nothing is lost.
run_job() {
    local notes reader status=0
    notes=$(mktemp -d)
    mkfifo "$notes/output"
    # It reads on until the command has ended, whatever signals this job gets.
    (trap '' TERM INT && exec sed -u "/$1/w $notes/saved" <"$notes/output") &
    reader=$!
    "${@:2}" >"$notes/output" || status=$?
    wait "$reader" || true
    if [ "$status" = 143 ] && [ -s "$notes/saved" ]; then
        status=0
        # A job that was cancelled or is being requeued already is not running.
        if [ "${REQUEUE:-}" = 1 ] && scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
            echo "ended by SIGTERM; requeued"
            scontrol requeue "$SLURM_JOB_ID"
        else
            echo "ended by SIGTERM; go on: the same sbatch (REQUEUE=1 does so by itself)"
        fi
    fi
    rm -r "$notes"
    exit "$status"
}

[ "${BASH_SOURCE[0]}" != "$0" ] || ranks "$@"
