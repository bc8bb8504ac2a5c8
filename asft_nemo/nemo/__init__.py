"""The only package that imports nemo, lightning and nemo_run at module level.

NeMo's own messages are kept to errors unless ``ASFT_VERBOSE`` is set. On a machine without a GPU the CPU backend has to be in place
before megatron is imported, so importing this package installs it.
"""

import contextlib
import os

from asft_nemo.cpu import backend as _cpu_backend
from asft_nemo.logs import quiet_upstream as _quiet_upstream
from asft_nemo.logs import verbose as _verbose

_cpu_backend.install()

with open(os.devnull, "w") as _nowhere:
    # some upstream modules print at import
    with contextlib.nullcontext() if _verbose() else contextlib.redirect_stdout(_nowhere):
        import nemo.utils  # its logger first, so that the imports below are quiet

        _quiet_upstream()
        _cpu_backend.install_for_nemo()
        import nemo.collections.llm  # noqa: F401

_quiet_upstream()
