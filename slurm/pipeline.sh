#!/usr/bin/env bash
# From shards to a picture in one chain of jobs, each of which waits for what it reads:
#   precompute prior   -> train prior   -> export prior   -\
#   precompute decoder -> train decoder -> export decoder -> generate
# All settings are checked before the first job is queued; if one job fails, those that wait for it are removed. The
# same command again, after the exports were removed, keeps precomputed shards and continues training.
#
#   slurm/pipeline.sh --shards /data/shards --run-dir /runs/k22 --nodes 4 --gpus-per-node 8 --sbatch exclusive
#
#   --shards SHARDS            corpus of images and captions
#   --run-dir DIR              folder of everything that is made, seen by all nodes: cache/, prior/, decoder/, export/,
#                              sample.png, logs/
#   --validation-shards SHARDS corpus for validation, precomputed too
#   --nodes N                  nodes of a precomputing or training job (default 1)
#   --gpus-per-node N          GPUs a node, a rank each (default 8)
#   --config-prior NAME_OR_FILE, --config-decoder NAME_OR_FILE
#                              recipe or YAML file (default: prior_full, decoder_full)
#   --set KEY=VALUE            setting of both networks; --set-prior and --set-decoder: of one; repeatable
#   --flip                     precompute mirrored images too, for data.horizontal_flip
#   --sbatch NAME[=VALUE]      long option of sbatch for every job, e.g. partition=gpu; repeatable
#   --prompt TEXT              what is drawn at the end (default: a lighthouse in fog)
#   --image-size PIXELS        of that picture (default 512)
#   --dry-run                  print the commands and submit nothing
#
# Prints each job's id. Ends with 78 and one line if a setting cannot work or sbatch refuses; nothing stays queued then.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
refuse() {
  echo "${0##*/}: $*" >&2
  exit 78
}

shards='' run_dir='' validation='' nodes=1 gpus=8 prompt='a lighthouse in fog' size=512 is_dry=0
declare -A config=([prior]=prior_full [decoder]=decoder_full)
both=() prior=() decoder=() flip=() options=()
while [ "$#" -gt 0 ]; do
  name=${1%%=*}
  case $name in
    --flip) flip=(--flip); shift; continue ;;
    --dry-run) is_dry=1; shift; continue ;;
    --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
  esac
  if [ "$name" != "$1" ]; then
    value=${1#*=}
    shift
  else
    # Of what begins with dashes only --name=value makes a value.
    [[ $# -gt 1 && $2 != --* ]] || refuse "$name is no option or needs a value; see --help"
    value=$2
    shift 2
  fi
  case $name in
    --shards) shards=$value ;;
    --run-dir) run_dir=$value ;;
    --validation-shards) validation=$value ;;
    --nodes) nodes=$value ;;
    --gpus-per-node) gpus=$value ;;
    --config-prior) config[prior]=$value ;;
    --config-decoder) config[decoder]=$value ;;
    --set) both+=("--$value") ;;
    --set-prior) prior+=("--$value") ;;
    --set-decoder) decoder+=("--$value") ;;
    --sbatch) options+=("--${value#--}") ;;
    --prompt) prompt=$value ;;
    --image-size) size=$value ;;
    *) refuse "$name is no option; see --help" ;;
  esac
done
[ -n "$shards" ] || refuse "--shards is not set: the corpus that both networks are trained on"
case $run_dir in
  /*) ;;
  *) refuse "--run-dir=$run_dir must be an absolute path, on a file system that all nodes see" ;;
esac
[ ! -e "$run_dir/export" ] || refuse "$run_dir/export is there: remove it, or choose another --run-dir"

export KANDINSKY_HOME=$root
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
source "$root/launch/python.sh"
unset KANDINSKY_COMMAND KANDINSKY_CONFIG NPROC_PER_NODE  # they would reach the jobs, and change them

# The words of a network's commands; a setting that is given twice is the last one's.
words_of() { # STAGE
  local -n own=$1
  local given=("--config=${config[$1]}" "${both[@]}" "${own[@]}") cache=$run_dir/cache/$1
  train=("${given[@]}" --data.source=cached "--data.shards=$cache" "--run.dir=$run_dir/$1")
  precompute=("$1" "${given[@]}" --data.source=raw --validation.every_steps=0)
  held_out=("${precompute[@]}" "--data.shards=$validation" "--out=$cache-validation")
  [ "$1" = prior ] || held_out+=(--data.aspect_buckets=false)
  precompute+=("--data.shards=$shards" "--out=$cache" "${flip[@]}")
  [ -z "$validation" ] || train+=("--validation.shards=$cache-validation")
}
checked() { "$python" -m kandinsky_dist submit "$@" --dry-run --nodes="$nodes" --gpus-per-node="$gpus" >/dev/null; }
for stage in prior decoder; do
  words_of "$stage"
  checked precompute "${precompute[@]}"
  [ -z "$validation" ] || checked precompute "${held_out[@]}"
  checked "$stage" "${train[@]}"
done

submitted=()
# Submits a job that waits for others, and keeps its id under its name.
submit() { # NAME "NAMES OF JOBS" NODES GPUS SCRIPT WORDS...
  local name=$1 other id after='' words
  words=("--job-name=kandinsky-$name" "--nodes=$3" "--gpus-per-node=$4" "--output=$run_dir/logs/%x-%j.log"
    "${options[@]}")
  for other in $2; do after+=:${ids[$other]}; done
  after=${after:+--dependency=afterok$after}
  words+=(${after:+--kill-on-invalid-dep=yes} "$root/slurm/$5" "${@:6}")
  if [ "$is_dry" = 1 ]; then
    # Variables stand for ids that are not known yet; what is printed can be run as it is.
    printf '%s=$(sbatch --parsable%s%s)\n' "${name//-/_}" "${after:+ $after}" "$(printf ' %q' "${words[@]}")"
    ids[$name]="\${${name//-/_}%%;*}"
    return
  fi
  if ! id=$(sbatch --parsable ${after:+"$after"} "${words[@]}"); then
    [ "${#submitted[@]}" -eq 0 ] || scancel "${submitted[@]}" || true
    refuse "sbatch refused $name, see above; the jobs before it were removed"
  fi
  ids[$name]=${id%%;*}
  submitted+=("${ids[$name]}")
  printf '%-28s %s\n' "$name" "${ids[$name]}"
}
declare -A ids=()
if [ "$is_dry" = 1 ]; then
  printf 'export KANDINSKY_HOME=%q\nmkdir -p %q\n' "$root" "$run_dir/logs"
else
  mkdir -p "$run_dir/logs"  # without it Slurm ends the jobs at once and can tell nobody why
fi
for stage in prior decoder; do
  words_of "$stage"
  read_first=precompute-$stage
  submit "precompute-$stage" "" "$nodes" "$gpus" precompute.sbatch "${precompute[@]}"
  if [ -n "$validation" ]; then
    submit "precompute-$stage-validation" "" "$nodes" "$gpus" precompute.sbatch "${held_out[@]}"
    read_first+=" precompute-$stage-validation"
  fi
  submit "train-$stage" "$read_first" "$nodes" "$gpus" "$stage.sbatch" "${train[@]}"
  submit "export-$stage" "train-$stage" 1 1 command.sbatch export "$run_dir/$stage" "$run_dir/export/$stage"
done
submit generate "export-prior export-decoder" 1 1 command.sbatch generate "--prior=$run_dir/export/prior" \
  "--decoder=$run_dir/export/decoder" "--prompt=$prompt" "--size=$size" "--output=$run_dir/sample.png"
[ "$is_dry" = 1 ] || echo "logs: $run_dir/logs"
