#!/usr/bin/env bash
# Tests the checkout: `launch/test.sh --help`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
source launch/setup.sh

usage() {
  cat <<'END'
usage: launch/test.sh [--tier TIER]... [--changed [REF]] [--all | --slice K/N] [--coverage]

Format, lint and types, then the tests, fast ones first. Installs what it needs: into the active virtual environment
or .venv, and as root on Debian the packages of the Slurm tests. Every check runs, whatever fails before it.

  --tier TIER      only the tests of a tier, without format, lint and types; may be repeated:
                     unit      one process each, no process group
                     process   several processes, or a whole command
                     slurm     a real Slurm cluster on this machine
                     gpu       needs a CUDA device
  --changed [REF]  only the test files that reach what changed since the commit REF (default: HEAD), by imports
  --all            the campaign too: full matrices instead of pairs, 20 kills instead of 2; for a release
  --slice K/N      only the K-th of N slices of the campaign (K from 0), and none of the other tests
  --coverage       measure the lines of the package that the tests run; the table is the last that is printed

Time on 2 cores beside other work (load 7), so upper bounds: types 71 s, unit 8 min, process 45 min, slurm 15 min.
Not measured yet: idle cores, --all, a slice.
END
}

tiers=() campaign=none changed='' coverage=''
while [ "$#" -gt 0 ]; do
  case $1 in
    --tier)
      case ${2:-} in
        unit | process | slurm | gpu) tiers+=("$2") ;;
        *) refuse "--tier ${2:-} must be unit, process, slurm or gpu" ;;
      esac
      shift
      ;;
    --changed)
      changed=HEAD
      if [ "$#" -gt 1 ] && [[ $2 != --* ]]; then
        changed=$2
        shift
      fi
      git rev-parse --verify --quiet "$changed^{commit}" >/dev/null || refuse "--changed $changed is no commit"
      ;;
    --all) campaign=all ;;
    --slice)
      [[ ${2:-} =~ ^([0-9]+)/([0-9]+)$ ]] && [ "${BASH_REMATCH[1]}" -lt "${BASH_REMATCH[2]}" ] ||
        refuse "--slice ${2:-} must be K/N with K from 0 to N - 1"
      campaign=$2
      shift
      ;;
    --coverage) coverage=1 ;;
    -h | --help)
      usage
      exit
      ;;
    *) refuse "unknown argument $1: see launch/test.sh --help" ;;
  esac
  shift
done
with_checks=''
if [ "${#tiers[@]}" -eq 0 ]; then
  tiers=(unit process slurm)
  [ ! -e /dev/nvidia0 ] || tiers+=(gpu)
  [ "$campaign" != none ] && [ "$campaign" != all ] || with_checks=1
fi

say "Installing"
install_project deepspeed,lora,test,lint
export VIRTUAL_ENV=${VIRTUAL_ENV:-$root/.venv}
export PATH=$VIRTUAL_ENV/bin:$PATH
if [[ " ${tiers[*]} " == *" slurm "* ]] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
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
# Runs a check to its end and goes on to the next one, so that one run shows all there is to mend.
check() {
  local name=$1 outcome=0 started=$SECONDS
  shift
  say "$name: $*"
  "$@" || outcome=$?
  # pytest's 5: no test is left of that tier.
  [ "$outcome" -eq 0 ] || { [ "$outcome" -eq 5 ] && [[ $name == *tests ]]; } || failed+=("$name")
  echo "  $name: $((SECONDS - started)) s"
}
if [ -n "$with_checks" ]; then
  check format ruff format --check .
  check lint ruff check .
  check types mypy
fi

# The ranks of a test share the cores; threads of every rank on every core would only be in each other's way.
export OMP_NUM_THREADS=1
[ "$campaign" != all ] || export KANDINSKY_DIST_CAMPAIGN=${KANDINSKY_DIST_CAMPAIGN:-20}
pytest=(pytest)
if [ -n "$coverage" ]; then
  rm -rf .coverage
  mkdir .coverage
  pytest=(python -m coverage run -m pytest)
fi
# Runs the tests of a tier: its name, then what pytest is given.
test_tier() {
  local tier=$1 files=() found=0
  shift
  if [ -n "$changed" ]; then
    mapfile -t files < <(python tests/tools/changed.py "$changed" --tier "$tier")
    if [ "${#files[@]}" -eq 0 ]; then
      say "$tier tests: none reaches the change"
      return
    fi
  fi
  if [[ $campaign == */* ]]; then
    pytest --quiet --collect-only --campaign "$campaign" "$@" >/dev/null || found=$?
  fi
  if [ "$found" -eq 5 ]; then  # pytest's "no test is left"
    say "$tier tests: none in slice $campaign"
    return
  fi
  check "$tier tests" "${pytest[@]}" --campaign "$campaign" --durations=10 "$@" "${files[@]}"
}
unit=()
[ -n "$changed" ] || unit=(tests/unit)
for tier in "${tiers[@]}"; do
  case $tier in
    # Neighbours stay on one worker, so that a module's fixtures are made once; who is done takes from the other.
    # Named, the folder of the unit tests is all that the workers collect.
    unit) test_tier unit "${unit[@]}" -n 2 --dist worksteal -m "not dist and not integration and not slurm and not gpu" ;;
    process) test_tier process -n 2 --dist worksteal -m "(dist or integration) and not slurm and not gpu" ;;
    slurm) test_tier slurm -m slurm ;;
    gpu) test_tier gpu -m gpu ;;
  esac
done

if [ -n "$coverage" ]; then
  python -m coverage combine --quiet
  python -m coverage report
fi
if [ "${#failed[@]}" -gt 0 ]; then
  printf '\nFailed: %s\n' "$(IFS=';'; echo "${failed[*]}")"
  # Last, and by name alone: all else about them may lie pages further up.
  [ ! -f "$failed_tests" ] || sed -n 's/^ *"\(.*\)": true,\{0,1\}$/  \1/p' "$failed_tests"
  exit 1
fi
say "All passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
