#!/usr/bin/env bash
# The common part of slurm/*.sbatch: `slurm/train.sh STAGE ARGUMENTS...` inside an allocation trains over all of its
# nodes, one task a node, each the parent of its node's ranks. Ends with the exit status of the run.
#
#   KANDINSKY_CONFIG   recipe or YAML file (default: prior_full or decoder_full)
#   NPROC_PER_NODE     ranks a node (default: the job's GPUs there, else 1)
#   KANDINSKY_COMMAND  what is run (default: train); processes of precompute share a folder and need no meeting
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
srun --ntasks-per-node=1 --nodes="$NUM_NODES" --cpus-per-task="$cores" --wait="$wait" \
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
