#!/usr/bin/bash
# Stage import of /shared/runs/medical_72b, made by asft launch.
set -euo pipefail
cd /START
if [ -e /shared/runs/medical_72b/base ]; then
  echo /shared/runs/medical_72b/base 'is there already'
else
  /PYTHON -m asft_nemo import /models/Qwen2.5-72B /shared/runs/medical_72b/base
fi
