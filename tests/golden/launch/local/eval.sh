#!/usr/bin/bash
# Stage eval of /START/run, made by asft launch.
set -euo pipefail
cd /START
[ -e /START/run/launch/export.done ] || { echo 'asft: stage export has not succeeded, so eval is not run' >&2; exit 3; }
if [ -e /START/run/eval/base/results.json ]; then
  echo /START/run/eval/base/results.json 'is there already'
else
  /PYTHON -m asft_nemo eval /PROJECT/assets/tiny-base --suite suite.jsonl --backend hf --protocol greedy --max-tokens 256 --batch-size 16 --limit 8 --out /START/run/eval/base
fi
checkpoint=$(readlink -e /START/run/checkpoints/latest) || { echo 'asft: there is no checkpoint at' /START/run/checkpoints/latest >&2; exit 2; }
step=$(basename "$checkpoint")
/PYTHON -m asft_nemo eval /START/run/hf/"$step" --suite suite.jsonl --backend hf --protocol greedy --max-tokens 256 --batch-size 16 --limit 8 --out /START/run/eval/"$step"
touch /START/run/launch/eval.done
