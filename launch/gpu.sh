#!/usr/bin/env bash
# One GPU for a quarter of an hour: the GPU tests, then the measurements that matter most, within a fixed time.
#
#   launch/gpu.sh OUT [--minutes 9] [--wheels DIR] [options of kandinsky-dist bench gpu]
#
#   OUT            folder for the results: records (JSON), gpu.md (the table) and gpu.log
#   --minutes N    that everything may take; the script ends by itself before
#   --wheels DIR   wheels of packages that this machine lacks; no network is used then. CLIP's vocabulary comes from
#                  the wheel of open_clip_torch
#
# Needs no installation: it uses the active virtual environment, the checkout's .venv or python3, and this checkout.
# Exit status: 0 all steps that were begun passed, 1 one did not, 78 wrong arguments or no GPU.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/python.sh"
usage="launch/gpu.sh OUT [--minutes N] [--wheels DIR]"

refuse() {
  echo "gpu.sh: $*" >&2
  exit 78
}

out='' minutes=9 wheels='' options=()
while [ $# -gt 0 ]; do
  case $1 in
    --minutes | --wheels)
      [ $# -ge 2 ] || refuse "$1 has no value: $usage"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --*)
      options+=("$1")
      shift
      while [ $# -gt 0 ] && [[ $1 != --* ]]; do  # values of an option that bench gpu knows
        options+=("$1")
        shift
      done
      ;;
    *)
      [ -z "$out" ] || refuse "$1: one OUT is taken, and $out was given before: $usage"
      out=$1
      shift
      ;;
  esac
done
[ -n "$out" ] || refuse "no OUT: name a folder for the results: $usage"
[[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || refuse "--minutes $minutes is no number: give minutes, such as 9"

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [ -n "$wheels" ]; then
  compgen -G "$wheels/*.whl" >/dev/null || refuse "--wheels $wheels holds no .whl file: name a folder of wheels"
  wheels=$(cd "$wheels" && pwd)
  site=$(mktemp -d "${TMPDIR:-/tmp}/kandinsky-site.XXXXXX")
  trap 'rm -rf "$site"' EXIT
  # open_clip_torch is only unpacked for CLIP's vocabulary, by models/tokenizer.py.
  packages=()
  for wheel in "$wheels"/*.whl; do
    [[ ${wheel##*/} == open_clip_torch-* ]] || packages+=("$wheel")
  done
  [ "${#packages[@]}" -eq 0 ] || "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
    --no-compile --find-links "$wheels" --target "$site" "${packages[@]}" ||
    refuse "the wheels of $wheels do not install for $("$python" --version): see above, and bring fitting ones"
  export PYTHONPATH=$site:$PYTHONPATH PIP_NO_INDEX=1 PIP_FIND_LINKS=$wheels HF_HUB_OFFLINE=1
fi

"$python" -m kandinsky_dist bench gpu "$out" --minutes "$minutes" --spent-seconds "$SECONDS" "${options[@]}"
