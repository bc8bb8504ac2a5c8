"""The only package that imports nemo, lightning and nemo_run at module level.

On a machine without a GPU the CPU backend has to be in place before megatron is imported, so importing this package installs it.
"""

from asft_nemo.cpu import backend as _cpu_backend

_cpu_backend.install_for_nemo()
