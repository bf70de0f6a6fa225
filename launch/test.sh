#!/usr/bin/env bash
# Everything that must pass before a change lands: format, lint, types, then the tests in tiers, fast ones first. Installs what it
# needs: into the active virtual environment or .venv, and as root on Debian the packages for the Slurm tests.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
source launch/setup.sh

say "Installing"
install_project deepspeed,lora,test,lint
export VIRTUAL_ENV=${VIRTUAL_ENV:-$root/.venv}
export PATH=$VIRTUAL_ENV/bin:$PATH
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  packages=(slurmctld slurmd slurm-client munge iproute2)
  if ! dpkg --status "${packages[@]}" >/dev/null 2>&1; then
    # Without these packages the Slurm tests are skipped and say so; all else can still be tested.
    { quietly apt-get update && quietly env DEBIAN_FRONTEND=noninteractive apt-get install --yes \
      --no-install-recommends "${packages[@]}"; } || echo "  Slurm's packages could not be installed" >&2
  fi
fi

say "Format, lint, types"
ruff format --check .
ruff check .
mypy

# Two cores are enough; threads of every rank on every core would only be in each other's way.
export OMP_NUM_THREADS=1
status=0
# Runs a tier; one without tests (5) is no failure.
tier() {
  local name=$1 outcome=0
  shift
  say "Tests: $name"
  pytest --durations=5 "$@" || outcome=$?
  [ "$outcome" -eq 0 ] || [ "$outcome" -eq 5 ] || status=1
}
tier unit -n 2 -m "not dist and not integration and not slurm and not gpu"
tier "processes and command line" -m "(dist or integration) and not slurm and not gpu"
tier slurm -m slurm
[ ! -e /dev/nvidia0 ] || tier gpu -m gpu

[ "$status" -eq 0 ] && say "All passed" || say "Failures: see above"
exit "$status"
