#!/usr/bin/bash
# Stage train of /START/run, made by asft launch.
set -euo pipefail
cd /START
[ -e /START/run/launch/prepare.done ] || { echo 'asft: stage prepare has not succeeded, so train is not run' >&2; exit 3; }
[ -e /START/run/launch/import.done ] || { echo 'asft: stage import has not succeeded, so train is not run' >&2; exit 3; }
/PYTHON -m asft_nemo train \
  experiment=tiny_gsm8k \
  parallel.tp_size=2 \
  run.dir=/START/run \
  run.world_size=4 \
  'data.train=[/START/run/data/train]' \
  trainer.resume=if_exists
touch /START/run/launch/train.done
