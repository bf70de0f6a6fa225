#!/usr/bin/env bash
# One rank, as a task of srun: `launch/rank.sh train prior --config prior_full ...`. Which of how many it is Slurm says,
# where rank 0 listens MASTER_ADDR and MASTER_PORT. Exit status: that of the rank, see launch/node.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/python.sh"
# Of another launcher, in whose shell the job may have been submitted; all ranks would take themselves for one.
unset RANK LOCAL_RANK WORLD_SIZE
exec "$python" -m kandinsky_dist "$@"
