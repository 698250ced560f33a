#!/usr/bin/env bash
# One torchrun per node and one rank per GPU, over all nodes of a SLURM job. Runs inside the job.
#     bash scripts/srun_torchrun.sh run_pretraining.py FLAGS ...
# As a launcher of the experiments: reproduce_all.sh --scale paper --launcher "bash scripts/srun_torchrun.sh".
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # one per line; `head` would close the pipe before scontrol ends
master=${nodes%%$'\n'*}
port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
script=$1
shift
# SLURM_NODEID differs from task to task, so it is looked up there and not here.
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 bash -c 'exec "$0" --nnodes "$1" --node_rank "$SLURM_NODEID" --nproc_per_node "$2" \
    --master_addr "$3" --master_port "$4" "${@:5}"' \
    "$root/.venv/bin/torchrun" "$SLURM_JOB_NUM_NODES" "${SLURM_GPUS_ON_NODE:-1}" "$master" "$port" "$root/$script" "$@"
