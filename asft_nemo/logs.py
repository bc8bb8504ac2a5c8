"""Logging of our own processes: our messages once, upstream's only when they matter."""

from __future__ import annotations

import logging
import os
import sys
import warnings

UPSTREAM = (
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "pytorch_lightning",  # another package of Lightning, which takes over the shared rank-zero logger when imported
    "megatron",
    "torch.distributed",
    "nv_one_logger",
    "nemo",
    "nemo_logger",  # the one behind nemo.utils.logging; its own set_verbosity() would set foreign handlers on it, too
)


def verbose() -> bool:
    """Whether upstream's own messages are wanted: the environment variable ``ASFT_VERBOSE`` is set."""
    return bool(os.environ.get("ASFT_VERBOSE"))


def set_up_logging(*, rank: int = 0) -> None:
    """Our messages of rank 0 at INFO, of other ranks at ERROR, on stderr; upstream's warnings only when ``ASFT_VERBOSE`` is set.

    Args:
        rank: global rank of this process.
    """
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("asft_nemo").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    if not verbose():
        warnings.filterwarnings("ignore")
        quiet_upstream()


def quiet_upstream() -> None:
    """Raises the level of upstream loggers to ERROR; to be called again after imports that set their own levels."""
    if verbose():
        return
    for name in (*UPSTREAM, *logging.root.manager.loggerDict):
        if name.split(".")[0] in UPSTREAM or name in UPSTREAM:
            logger = logging.getLogger(name)
            # setting a level clears what every logger remembers: some ms each, with NeMo loaded
            if logger.level != logging.ERROR:
                logger.setLevel(logging.ERROR)
