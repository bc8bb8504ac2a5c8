#!/usr/bin/bash
# Stage prepare of /shared/runs/medical_72b, made by asft launch.
set -euo pipefail
cd /START
/PYTHON -m asft_nemo data prepare /shared/data/medmcqa.jsonl --out /shared/runs/medical_72b/data/medmcqa \
  model.path=/models/Qwen2.5-72B \
  data.template=alpaca
