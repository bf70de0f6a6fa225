#!/usr/bin/env bash
# A run on this machine, in one process a GPU: `launch/local.sh train prior --config prior_full ...`.
# NPROC=2 launch/local.sh ... takes two processes, with or without GPUs. Exit status: see launch/node.sh.
set -euo pipefail
# Inside an allocation too, this is one machine's run.
unset NUM_NODES RENDEZVOUS
export NPROC_PER_NODE=${NPROC:-${NPROC_PER_NODE:-auto}}
exec "$(dirname "${BASH_SOURCE[0]}")/node.sh" "$@"
