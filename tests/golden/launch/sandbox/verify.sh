#!/usr/bin/bash
# Stage verify of /START/run, made by asft launch.
set -euo pipefail
cd /START
export ASFT_DEVICE=cpu
export GLOO_SOCKET_IFNAME=lo
export OMP_NUM_THREADS=1
checkpoint=$(readlink -e /START/run/checkpoints/latest) || { echo 'asft: there is no checkpoint at' /START/run/checkpoints/latest >&2; exit 2; }
step=$(basename "$checkpoint")
/PYTHON -m asft_nemo verify /START/run/checkpoints/"$step" /START/run/hf/"$step" --out /START/run/verify/"$step" --weights-only
