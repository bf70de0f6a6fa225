#!/usr/bin/env bash
# One node's ranks: `launch/node.sh train prior --config prior_full ...` is `kandinsky-dist train prior ...` in as
# many processes as the node has GPUs. srun starts it once on every node, launch/local.sh once on this machine.
#
#   NPROC_PER_NODE   ranks on this node (default: the job's GPUs here, else all GPUs, else 1)
#   NUM_NODES        nodes of the run (default 1)
#   RENDEZVOUS       host:port where the nodes meet, the same on all of them (needed if NUM_NODES > 1)
#   MIN_NODES        fewest nodes to go on with when some are gone (default NUM_NODES); the global batch must divide
#                    by what is left
#   MAX_RESTARTS     how often ranks that crash or hang are started again here, from the last checkpoint (default 0)
#   RENDEZVOUS_ID    name of the meeting (default: 0)
#
# Ends with the exit status of the ranks: 0 done, 75 stopped on request (the same command resumes), 78
# configuration, 65 data, anything else a failure.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/python.sh"

ranks=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-auto}}
if [ "$ranks" = auto ]; then
  ranks=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
if [ "${NUM_NODES:-1}" -gt 1 ]; then
  meeting=(--nnodes "${MIN_NODES:-$NUM_NODES}:$NUM_NODES" --rdzv-backend c10d --rdzv-id "${RENDEZVOUS_ID:-0}"
    --rdzv-endpoint "${RENDEZVOUS:?host:port of the first node is needed with NUM_NODES=$NUM_NODES}")
else
  meeting=(--standalone)
fi
if [ -z "${OMP_NUM_THREADS:-}" ]; then
  OMP_NUM_THREADS=$(($(nproc) / ranks))
  [ "$OMP_NUM_THREADS" -ge 1 ] || OMP_NUM_THREADS=1
  export OMP_NUM_THREADS
fi
restarts=${MAX_RESTARTS:-0}
if [ "$restarts" -gt 0 ]; then
  # torchrun's own store keeps what ranks wrote into it, and the next ones over gloo would meet there.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
exec "$python" "$root/launch/run_ranks.py" "${meeting[@]}" --max-restarts "$restarts" --nproc-per-node "$ranks" -m kandinsky_dist "$@"
