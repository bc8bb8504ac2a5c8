"""`python -m asft_nemo` is the `asft` command."""

import sys

from asft_nemo.cli import main

sys.exit(main())
