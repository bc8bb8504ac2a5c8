"""A second, frozen model in the policy's layout."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from asft_nemo.reference.frozen import FrozenChunks

logger = logging.getLogger(__name__)


class ResidentReference(FrozenChunks):
    """Frozen chunks with the base checkpoint's weights.

    Args:
        build_chunk, vp_size, dtype: see `FrozenChunks`.
        weights_dir: torch distributed checkpoint of the base model (`weights/`).
    """

    def __init__(
        self,
        build_chunk: Callable[[int | None], nn.Module],
        *,
        vp_size: int | None,
        weights_dir: Path,
        dtype: torch.dtype,
    ):
        super().__init__(build_chunk, vp_size=vp_size, dtype=dtype)
        self.load_weights(weights_dir)
        logger.info(
            "resident reference: %d parameters on this rank, from %s", self.num_parameters, weights_dir
        )
