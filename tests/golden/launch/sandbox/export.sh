#!/usr/bin/bash
# Stage export of /START/run, made by asft launch.
set -euo pipefail
cd /START
export ASFT_DEVICE=cpu
export GLOO_SOCKET_IFNAME=lo
export OMP_NUM_THREADS=1
checkpoint=$(readlink -e /START/run/checkpoints/latest) || { echo 'asft: there is no checkpoint at' /START/run/checkpoints/latest >&2; exit 2; }
step=$(basename "$checkpoint")
if [ -e /START/run/hf/"$step" ]; then
  echo /START/run/hf/"$step" 'is there already'
else
  /PYTHON -m asft_nemo export /START/run/checkpoints/"$step" /START/run/hf/"$step"
fi
