#!/usr/bin/bash
# Stage import of /START/run, made by asft launch.
set -euo pipefail
cd /START
export ASFT_DEVICE=cpu
export GLOO_SOCKET_IFNAME=lo
export OMP_NUM_THREADS=1
if [ -e /START/run/base ]; then
  echo /START/run/base 'is there already'
else
  /PYTHON -m asft_nemo import /PROJECT/assets/tiny-base /START/run/base
fi
