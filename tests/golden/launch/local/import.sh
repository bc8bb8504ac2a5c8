#!/usr/bin/bash
# Stage import of /HOME-OF-THE-RUN, made by asft launch.
set -euo pipefail
cd /START
if [ -e /START/run/base ]; then
  echo /START/run/base 'is there already'
else
  /PYTHON -m asft_nemo import /PROJECT/assets/tiny-base /START/run/base
fi
touch /HOME-OF-THE-RUN/launch/import.done
