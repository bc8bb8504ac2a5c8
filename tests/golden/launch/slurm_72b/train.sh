#!/usr/bin/bash
# Stage train of /shared/runs/medical_72b, made by asft launch.
set -euo pipefail
# A signal to stop must not end a rank that does not listen yet; the others hear it, or Slurm ends the job at its time.
trap '' USR1 TERM
# One rank: its number and where rank 0 is come from Slurm's variables.
export ASFT_SLURM_RANKS=1
export ASFT_STOP_FILE=/shared/runs/medical_72b/launch/stopped-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
cd /START
exec /PYTHON -m asft_nemo train \
  experiment=medical_qwen25_72b \
  model.path=/models/Qwen2.5-72B \
  run.dir=/shared/runs/medical_72b \
  run.world_size=32 \
  'data.train=[/shared/runs/medical_72b/data/medmcqa]' \
  trainer.resume=if_exists
