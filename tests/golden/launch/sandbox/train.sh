#!/usr/bin/bash
# Stage train of /START/run, made by asft launch.
set -euo pipefail
# A signal to stop must not end a rank that does not listen yet; the others hear it, or Slurm ends the job at its time.
trap '' USR1 TERM
# One rank: its number and where rank 0 is come from Slurm's variables.
export ASFT_SLURM_RANKS=1
export ASFT_STOP_FILE=/START/run/launch/stopped-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
cd /START
export ASFT_DEVICE=cpu
export GLOO_SOCKET_IFNAME=lo
export OMP_NUM_THREADS=1
exec /PYTHON -m asft_nemo train \
  experiment=tiny_gsm8k \
  parallel.tp_size=2 \
  reference=cached \
  run.dir=/START/run \
  run.world_size=4 \
  'data.train=[/START/run/data/train]' \
  trainer.resume=if_exists
