#!/usr/bin/bash
# Stage compare of /START/run, made by asft launch.
set -euo pipefail
cd /START
[ -e /START/run/launch/eval.done ] || { echo 'asft: stage eval has not succeeded, so compare is not run' >&2; exit 3; }
checkpoint=$(readlink -e /START/run/checkpoints/latest) || { echo 'asft: there is no checkpoint at' /START/run/checkpoints/latest >&2; exit 2; }
step=$(basename "$checkpoint")
/PYTHON -m asft_nemo compare base=/START/run/eval/base asft=/START/run/eval/"$step" --out /START/run/compare/"$step"
touch /START/run/launch/compare.done
