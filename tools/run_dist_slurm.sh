#!/usr/bin/env bash
# Runs a command as several Slurm tasks, one for each GPU. When a task fails, Slurm ends the others. SIGNAL_SECONDS before
# the time limit Slurm sends SIGUSR1: main.py saves and exits with code 75. docs/reliability.md has a batch script that
# is then requeued.
set -euo pipefail
# shellcheck source=tools/dev/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/dev/env.sh"

(($# >= 4)) || die "usage: [GPUS_PER_NODE=8] [CPUS_PER_TASK=4] [GRES=<gpu:8, or none for CPU>] [MASTER_PORT=<port>] [SIGNAL_SECONDS=<from the signal to the time limit, 120>] [SRUN_ARGS=<flags of srun>] $0 <partition> <job name> <gpus> <command> [arguments]"
partition=$1 job_name=$2
split_over_nodes "$3"
shift 3
[[ $1 != *.py ]] || set -- python -u "$@"
command -v srun >/dev/null || die "there is no srun here: run this where Slurm is, or use tools/run_dist_launch.sh"
command -v python >/dev/null || die "there is no python on PATH: activate the environment of the tasks"

CPUS_PER_TASK=${CPUS_PER_TASK:-4}
GRES=${GRES:-gpu:$GPUS_PER_NODE}
SIGNAL_SECONDS=${SIGNAL_SECONDS:-120}
[[ $SIGNAL_SECONDS =~ ^[0-9]+$ ]] || die "SIGNAL_SECONDS must be an integer of at least 0, not '$SIGNAL_SECONDS'"
threads=1 # with GPUs, the data loaders need the cores
[[ $GRES != none ]] || threads=$CPUS_PER_TASK
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}

# Runs in every task: sets torchrun's variables from Slurm's.
# shellcheck disable=SC2317 # called there
run_task() {
  local hosts
  hosts=$(scontrol show hostnames "$SLURM_STEP_NODELIST")
  export MASTER_ADDR=${hosts%%$'\n'*}
  # Equal for all tasks of a step, different between steps, and below the ports of outgoing connections.
  export MASTER_PORT=${MASTER_PORT:-$((10000 + (SLURM_JOB_ID + SLURM_STEP_ID) % 20000))}
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$GPUS_PER_NODE
  exec "$@"
}

# shellcheck disable=SC2086 # SRUN_ARGS holds several flags
exec srun -p "$partition" --job-name="$job_name" --gres="$GRES" --ntasks="$((NODES * GPUS_PER_NODE))" \
  --ntasks-per-node="$GPUS_PER_NODE" --cpus-per-task="$CPUS_PER_TASK" --kill-on-bad-exit=1 \
  --signal="USR1@$SIGNAL_SECONDS" ${SRUN_ARGS:-} \
  bash -c "set -euo pipefail; $(declare -f run_task); run_task \"\$@\"" "${0##*/}" "$@"
