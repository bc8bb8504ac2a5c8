#!/usr/bin/bash
# Stage compare of /START/run, made by asft launch.
set -euo pipefail
cd /START
[ -e /START/run/launch/eval.done ] || { echo 'asft: stage eval has not succeeded, so compare is not run' >&2; exit 3; }
step=$(basename "$(readlink -e /START/run/checkpoints/latest)")
/PYTHON -m asft_nemo compare base=/START/run/eval/base asft=/START/run/eval/"$step" --out /START/run/compare/"$step"
touch /START/run/launch/compare.done
