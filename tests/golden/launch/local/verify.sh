#!/usr/bin/bash
# Stage verify of /START/run, made by asft launch.
set -euo pipefail
cd /START
[ -e /START/run/launch/export.done ] || { echo 'asft: stage export has not succeeded, so verify is not run' >&2; exit 3; }
checkpoint=$(readlink -e /START/run/checkpoints/latest) || { echo 'asft: there is no checkpoint at' /START/run/checkpoints/latest >&2; exit 2; }
step=$(basename "$checkpoint")
/PYTHON -m asft_nemo verify /START/run/checkpoints/"$step" /START/run/hf/"$step" --out /START/run/verify/"$step" parallel.tp_size=2 parallel.pp_size=1
touch /START/run/launch/verify.done
