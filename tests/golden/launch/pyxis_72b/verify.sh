#!/usr/bin/bash
# Stage verify of /shared/runs/medical_72b, made by asft launch.
set -euo pipefail
cd /START
export NCCL_DEBUG=WARN
step=$(basename "$(readlink -e /shared/runs/medical_72b/checkpoints/latest)")
asft verify /shared/runs/medical_72b/checkpoints/"$step" /shared/runs/medical_72b/hf/"$step" --out /shared/runs/medical_72b/verify/"$step" --weights-only
