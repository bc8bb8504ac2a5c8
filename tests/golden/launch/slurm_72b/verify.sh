#!/usr/bin/bash
# Stage verify of /shared/runs/medical_72b, made by asft launch.
set -euo pipefail
cd /START
checkpoint=$(readlink -e /shared/runs/medical_72b/checkpoints/latest) || { echo 'asft: there is no checkpoint at' /shared/runs/medical_72b/checkpoints/latest >&2; exit 2; }
step=$(basename "$checkpoint")
/PYTHON -m asft_nemo verify /shared/runs/medical_72b/checkpoints/"$step" /shared/runs/medical_72b/hf/"$step" --out /shared/runs/medical_72b/verify/"$step" --weights-only
