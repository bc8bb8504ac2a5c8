"""The one place that decides whether the Triton kernels run."""

from __future__ import annotations

import logging
import os
from functools import cache

import torch
from torch import Tensor

from asft_nemo.errors import ConfigError

_log = logging.getLogger(__name__)

#: The environment variable and its values: 1 (or unset) for CUDA tensors, 0 for never, interpret for tensors on
#: the CPU by Triton's interpreter, which is for tests and needs TRITON_INTERPRET=1, too.
VARIABLE = "ASFT_TRITON"


def use_triton(logits_NV: Tensor) -> bool:
    """True where the kernels take a chunk of logits: fp32, on CUDA, not empty, and triton works there.

    Logs once a device what was found. Never True on a CPU, the interpreter asked for excepted.

    Raises:
        ConfigError: `ASFT_TRITON` has a value that means nothing, or the interpreter is not switched on.
    """
    asked = os.environ.get(VARIABLE, "1")
    if asked not in ("0", "1", "interpret"):
        raise ConfigError(
            f"{VARIABLE}={asked!r} means nothing: unset it (Triton on CUDA where it works), or set 0 (never)"
        )
    if asked == "0" or logits_NV.dtype != torch.float32 or logits_NV.numel() == 0:
        return False
    if logits_NV.is_cuda:
        return _works_on(logits_NV.device)
    if asked == "1":
        return False
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"{VARIABLE}=interpret needs TRITON_INTERPRET=1 before Python starts: set both, or unset both"
        )
    return True


@cache
def _works_on(device: torch.device) -> bool:
    """Tries the kernels once: triton may be missing, too old for the GPU, or without a C compiler."""
    from asft_nemo.losses.triton import launch

    try:
        launch.try_out(device)
    # Whatever goes wrong while compiling for this machine, PyTorch computes the same.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        _log.warning(
            "the loss uses PyTorch instead of Triton on %s (%s: %s); %s=0 says so without a try",
            device,
            type(error).__name__,
            reason,
            VARIABLE,
        )
        return False
    _log.info("the loss uses Triton kernels on %s", device)
    return True
