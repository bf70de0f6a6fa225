#!/usr/bin/env bash
# From a fresh clone to an image: installs into .venv, makes the demo corpus and tiny models, trains prior and decoder,
# exports them and draws a prompt. Run it again and it reuses what stands. Needs Python with venv, and npm for the
# demo pictures.
#
#   NPROC    processes to train in (default: all GPUs, or 2 without one)
#   PROMPT   what to draw (default: a 3d emoji of a fire engine)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
source launch/setup.sh
prompt=${PROMPT:-a 3d emoji of a fire engine}
started=$SECONDS

[ -e work/data/train/manifest.safetensors ] || command -v npm >/dev/null || refuse \
  "npm is not on PATH and fetches the demo pictures: install it (Debian: apt-get install npm)"
need_disk 1

say "1/7  Installing"
install_project deepspeed
export VIRTUAL_ENV=${VIRTUAL_ENV:-$root/.venv}
kandinsky() { "$python" -m kandinsky_dist "$@"; }
if [ -z "${NPROC:-}" ]; then
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  NPROC=$((gpus > 0 ? gpus : 2))
fi
export NPROC

say "2/7  Demo corpus -> work/data"
kandinsky data demo work/data

say "3/7  Tiny random models in the real architecture -> work/models"
kandinsky models init --size tiny --clip-statistics work/data/train work/models

step=4
for stage in prior decoder; do
  say "$step/7  Training the $stage: $NPROC processes, DeepSpeed ZeRO-2 -> work/runs/$stage"
  launch/local.sh train "$stage" --config "${stage}_tiny" --parallel.strategy zero2
  step=$((step + 1))
done

say "6/7  Exporting diffusers pipelines -> work/export"
for stage in prior decoder; do
  rm -rf "work/export/$stage"  # export keeps what it finds; a run that went on since deserves its newest weights
  kandinsky export "work/runs/$stage" "work/export/$stage"
done

say "7/7  Drawing \"$prompt\""
kandinsky generate --prior work/export/prior --decoder work/export/decoder --size 64 \
  --prompt "$prompt" --output work/sample.png

say "Done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s. What stands now:"
cat <<END
  work/data        demo corpus: tar shards with manifests, train and validation
  work/models      the tiny networks that training started from
  work/runs        run folders: config.yaml, metrics.jsonl, tensorboard/, checkpoints/
  work/export      the trained prior and decoder as diffusers pipelines
  work/sample.png  the image (from minutes of training of tiny networks: expect colours, not shapes)

Try next:
  source $(realpath --relative-to=. "$VIRTUAL_ENV")/bin/activate
  kandinsky-dist generate --prior work/export/prior --decoder work/export/decoder --size 64 \\
    --prompt "a 3d emoji of a blue heart" --output work/heart.png
  NPROC=$NPROC launch/local.sh train prior --config prior_tiny --parallel.strategy zero2 --run.max_steps 1200
END
