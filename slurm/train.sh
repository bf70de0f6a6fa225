#!/usr/bin/env bash
# The common part of slurm/*.sbatch: `slurm/train.sh STAGE ARGUMENTS...` inside an allocation trains over all of its
# nodes, one task a node, each the parent of its node's ranks. Ends with the exit status of the run.
#
#   KANDINSKY_CONFIG   recipe or YAML file (default: prior_full or decoder_full)
#   NPROC_PER_NODE     ranks a node (default: the job's GPUs there, else 1)
#   KANDINSKY_COMMAND  what is run (default: train); processes of precompute share a folder and need no meeting
#   KANDINSKY_TASKS    node: one task a node, which starts its ranks through launch/node.sh (default); rank: one task
#                      a rank, through launch/rank.sh, which Slurm then binds and counts one by one
#   KANDINSKY_SRUN     more options for srun, quoted as for a shell, which expands nothing in them
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stage=$1
shift
source "$root/slurm/env.sh"

export NUM_NODES=$SLURM_JOB_NUM_NODES
export RENDEZVOUS_ID=$SLURM_JOB_ID
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Below the ports that the kernel hands out by itself; two jobs that share a node differ in their ids.
export RENDEZVOUS=$first_node:$((20000 + SLURM_JOB_ID % 12000))
# Without it a task gets one core, whatever the job has (Slurm 22.05 and later).
cores=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}

command=${KANDINSKY_COMMAND:-train}
launcher=node.sh
# --wait: a node that lost its ranks cannot leave the others in a collective for ever; long enough for
# ranks that end together to end in peace.
wait=60
if [ "$command" = precompute ]; then
  # Each node by itself: what one leaves undone the others do, however long that takes.
  export NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-auto}}
  launcher=local.sh
  wait=0
fi
tasks=1
if [ "${KANDINSKY_TASKS:-node}" = rank ]; then
  tasks=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  [ "$tasks" != auto ] || tasks=1
  if [ "${MAX_RESTARTS:-0}" -gt 0 ] || [ "${MIN_NODES:-$NUM_NODES}" -lt "$NUM_NODES" ]; then
    echo "MAX_RESTARTS and MIN_NODES need KANDINSKY_TASKS=node: with rank nobody starts a rank again" >&2
    exit 78
  fi
  export MASTER_ADDR=$first_node MASTER_PORT=${RENDEZVOUS##*:}
  cores=$((SLURM_CPUS_ON_NODE > tasks ? SLURM_CPUS_ON_NODE / tasks : 1))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores}
  launcher=rank.sh
elif [ "${KANDINSKY_TASKS:-node}" != node ]; then
  echo "KANDINSKY_TASKS=$KANDINSKY_TASKS is neither node nor rank" >&2
  exit 78
fi
more=()
if [ -n "${KANDINSKY_SRUN:-}" ]; then
  # xargs takes quotes away as a shell does, and runs nothing that stands between them.
  words=$(xargs -r printf '%s\n' <<<"$KANDINSKY_SRUN") || {
    echo "KANDINSKY_SRUN=$KANDINSKY_SRUN cannot be split into words: close its quotes" >&2
    exit 78
  }
  mapfile -t more <<<"$words"
fi
srun --nodes="$NUM_NODES" --ntasks=$((NUM_NODES * tasks)) --ntasks-per-node="$tasks" --cpus-per-task="$cores" \
  --wait="$wait" "${more[@]}" \
  "$root/launch/$launcher" "$command" "$stage" --config "${KANDINSKY_CONFIG:-${stage}_full}" "$@" &
step=$!

# A signal for the batch shell (#SBATCH --signal=B:USR1@180, scancel --batch) is meant for the ranks, which save
# themselves and end with 75. It travels as USR1: srun takes TERM as the order to kill its step. bash runs a
# trap only between commands, hence srun in the background, and another wait after each signal.
forward() {
  was_signalled=1
  kill -USR1 "$step" 2>/dev/null || true
}
trap forward USR1 TERM
was_signalled=1
while [ "$was_signalled" = 1 ]; do
  was_signalled=0
  status=0
  wait "$step" || status=$?
done
exit "$status"
