#!/usr/bin/bash
# Stage prepare of /START/run, made by asft launch.
set -euo pipefail
cd /START
/PYTHON -m asft_nemo data prepare gsm8k/train.jsonl --out /START/run/data/train \
  model.path=/PROJECT/assets/tiny-base \
  data.template=alpaca \
  data.fields.prompt=question \
  data.fields.response=answer
touch /START/run/launch/prepare.done
