#!/usr/bin/env bash
# The common part of slurm/*.sbatch: `slurm/train.sh STAGE ARGUMENTS...` inside an allocation trains over all of its
# nodes, one task a node, each the parent of its node's ranks. Ends with the exit status of the run.
#
#   KANDINSKY_CONFIG     recipe or YAML file (default: prior_full or decoder_full)
#   NPROC_PER_NODE       ranks a node (default: the job's GPUs there, else 1)
#   KANDINSKY_COMMAND    what is run (default: train); processes of precompute share a folder and need no meeting
#   KANDINSKY_PREFLIGHT  0 leaves out the look at all nodes before the first step (kandinsky-dist preflight --help)
#   KANDINSKY_REQUEUES   how often a job may have been requeued and still requeue itself after a crash or hang (default 3)
#   KANDINSKY_TASKS      node: one task a node, which starts its ranks through launch/node.sh (default); rank: one task
#                        a rank, through launch/rank.sh, which Slurm then binds and counts one by one
#   KANDINSKY_SRUN       more options for srun, quoted as for a shell, which expands nothing in them
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stage=$1
shift
source "$root/slurm/env.sh"

export NUM_NODES=$SLURM_JOB_NUM_NODES
export RENDEZVOUS_ID=$SLURM_JOB_ID
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes%%$'\n'*}
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
config=${KANDINSKY_CONFIG:-${stage}_full}

# A run that saved itself (75) goes on in the same job, and so does one that crashed, a few times. Not what would come
# again (78, 65), nor a job that Slurm has ended itself: somebody's scancel, or a preemption that requeues.
end_with() {
  local status=$1 restarts=${SLURM_RESTART_COUNT:-0} allowed=${KANDINSKY_REQUEUES:-3}
  if [[ " 0 65 78 " != *" $status "* && $(scontrol --oneliner show job "$SLURM_JOB_ID") == *" JobState=RUNNING "* ]]; then
    if [ "$status" != 75 ] && [ "$restarts" -ge "$allowed" ]; then
      echo "ended with $status, not requeued: it was $restarts times (KANDINSKY_REQUEUES=$allowed)" >&2
    else
      echo "ended with $status, requeued" >&2
      scontrol requeue "$SLURM_JOB_ID" >&2 || echo "not requeued: submit the same command again" >&2
    fi
  fi
  exit "$status"
}

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

was_signalled=0
trap 'was_signalled=1' USR1 TERM
# Not with a container: what is outside of it is not what runs.
if [ "$command" = train ] && [ "${KANDINSKY_PREFLIGHT:-1}" != 0 ] && [[ "${KANDINSKY_SRUN:-}" != *--container* ]]; then
  source "$root/launch/python.sh"
  status=0
  "$python" -m kandinsky_dist preflight "$stage" --config "$config" "$@" || status=$?
  [ "$was_signalled" = 0 ] || end_with 75
  [ "$status" = 0 ] || end_with "$status"
fi
srun --nodes="$NUM_NODES" --ntasks=$((NUM_NODES * tasks)) --ntasks-per-node="$tasks" --cpus-per-task="$cores" \
  --wait="$wait" "${more[@]}" \
  "$root/launch/$launcher" "$command" "$stage" --config "$config" "$@" &
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

end_with "$status"
