#!/usr/bin/env bash
# Everything that must pass before a change lands: format, lint, types, then the tests in tiers, fast ones first.
# Installs what it needs: into the active virtual environment or .venv, and as root on Debian the packages for the
# Slurm tests.
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

failed=()
failed_tests=.pytest_cache/v/cache/lastfailed  # pytest adds to it from tier to tier
rm -f "$failed_tests"
# Runs a check to its end and goes on to the next one, so that one run tells all there is to mend.
check() {
  local name=$1 outcome=0
  shift
  say "$name: $*"
  "$@" || outcome=$?
  # pytest's 5: no test is in that tier.
  [ "$outcome" -eq 0 ] || { [ "$1" = pytest ] && [ "$outcome" -eq 5 ]; } || failed+=("$name")
}
check format ruff format --check .
check lint ruff check .
check types mypy

# The ranks of a test share the cores; threads of every rank on every core would only be in each other's way.
export OMP_NUM_THREADS=1
check "unit tests" pytest -n 2 --durations=5 -m "not dist and not integration and not slurm and not gpu"
check "process and command-line tests" pytest -n 2 --durations=25 -m "(dist or integration) and not slurm and not gpu"
check "slurm tests" pytest --durations=5 -m slurm
[ ! -e /dev/nvidia0 ] || check "gpu tests" pytest --durations=5 -m gpu

if [ "${#failed[@]}" -gt 0 ]; then
  printf '\nFailed: %s\n' "$(IFS=';'; echo "${failed[*]}")"
  # Last, and by name alone: all else about them may lie pages further up.
  [ ! -f "$failed_tests" ] || sed -n 's/^ *"\(.*\)": true,\{0,1\}$/  \1/p' "$failed_tests"
  exit 1
fi
say "All passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
