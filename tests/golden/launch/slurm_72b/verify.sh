#!/usr/bin/bash
# Stage verify of /shared/runs/medical_72b, made by asft launch.
set -euo pipefail
cd /START
step=$(basename "$(readlink -e /shared/runs/medical_72b/checkpoints/latest)")
/PYTHON -m asft_nemo verify /shared/runs/medical_72b/checkpoints/"$step" /shared/runs/medical_72b/hf/"$step" --out /shared/runs/medical_72b/verify/"$step" --weights-only
