#!/usr/bin/bash
# Stage import of /shared/runs/medical_72b, made by asft launch.
set -euo pipefail
cd /START
export NCCL_DEBUG=WARN
if [ -e /shared/runs/medical_72b/base ]; then
  echo /shared/runs/medical_72b/base 'is there already'
else
  asft import /models/Qwen2.5-72B /shared/runs/medical_72b/base
fi
