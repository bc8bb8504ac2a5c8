"""Logging of our own processes: our messages once, upstream's only when they matter."""

from __future__ import annotations

import logging
import os
import sys
import warnings

QUIET = ("nemo_logger", "lightning", "lightning.pytorch", "megatron", "torch.distributed", "nemo", "root")


def set_up_logging(*, rank: int = 0, verbose: bool | None = None) -> None:
    """Messages of rank 0 at INFO, of other ranks at ERROR; upstream libraries at ERROR unless verbose.

    Args:
        rank: global rank of this process.
        verbose: show upstream's own messages; None reads the environment variable ``ASFT_VERBOSE``.
    """
    if verbose is None:
        verbose = bool(os.environ.get("ASFT_VERBOSE"))
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("asft_nemo").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    if verbose:
        return
    warnings.filterwarnings("ignore")
    for name in QUIET[:-1]:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("NEMO_TESTING", "0")
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")
