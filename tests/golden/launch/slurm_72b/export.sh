#!/usr/bin/bash
# Stage export of /shared/runs/medical_72b, made by asft launch.
set -euo pipefail
cd /START
checkpoint=$(readlink -e /shared/runs/medical_72b/checkpoints/latest) || { echo 'asft: there is no checkpoint at' /shared/runs/medical_72b/checkpoints/latest >&2; exit 2; }
step=$(basename "$checkpoint")
if [ -e /shared/runs/medical_72b/hf/"$step" ]; then
  echo /shared/runs/medical_72b/hf/"$step" 'is there already'
else
  /PYTHON -m asft_nemo export /shared/runs/medical_72b/checkpoints/"$step" /shared/runs/medical_72b/hf/"$step"
fi
