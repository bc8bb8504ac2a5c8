#!/usr/bin/bash
# Stage export of /HOME-OF-THE-RUN, made by asft launch.
set -euo pipefail
cd /START
[ -e /HOME-OF-THE-RUN/launch/train.done ] || { echo 'asft: stage train has not succeeded, so export is not run' >&2; exit 3; }
step=$(basename "$(readlink -e /START/run/checkpoints/latest)")
if [ -e /START/run/hf/"$step" ]; then
  echo /START/run/hf/"$step" 'is there already'
else
  /PYTHON -m asft_nemo export /START/run/checkpoints/"$step" /START/run/hf/"$step"
fi
touch /HOME-OF-THE-RUN/launch/export.done
