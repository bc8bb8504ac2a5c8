#!/usr/bin/bash
# Stage prepare of /START/run, made by asft launch.
set -euo pipefail
cd /START
export ASFT_DEVICE=cpu
export GLOO_SOCKET_IFNAME=lo
export OMP_NUM_THREADS=1
/PYTHON -m asft_nemo data prepare gsm8k/train.jsonl --out /START/run/data/train \
  model.path=/PROJECT/assets/tiny-base \
  data.template=alpaca \
  data.fields.prompt=question \
  data.fields.response=answer
