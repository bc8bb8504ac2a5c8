"""What a reference is, whatever holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class ReferenceBytes:
    """What a reference holds on this rank between steps, in bytes.

    Attributes:
        device: weights on the device.
        host: weights in host memory.
        disk: the whole cache on disk (the same on every rank).
    """

    device: int = 0
    host: int = 0
    disk: int = 0


class ReferenceSource(Protocol):
    """The reference's hidden states for a step's micro batches, and its head.

    Implementations never change, are outside the policy's module tree (no optimizer, no DDP bucket, no checkpoint sees them), run
    without gradients and without dropout.

    Attributes:
        hit_rate: share of the last step's micro batches whose hidden states came from a cache; None where there is none.
    """

    hit_rate: float | None = None

    def start_step(self, step: int) -> None:
        """Told before each training step, counted from 0 over the whole run. Every rank calls it."""

    def read_ahead(self, sample_ids: Sequence[int]) -> None:
        """Told, when a step's hidden states are there, which examples this data-parallel rank takes in the next one, in order."""

    def hidden(
        self, micro_batches: Sequence[dict[str, Any]], *, sequence_length: int, micro_batch_size: int
    ) -> list[Tensor]:
        """Final hidden states of each micro batch, [S, B, H] (this rank's S/TP rows under sequence parallelism).

        Every rank of the pipeline calls it. The last stage gets one tensor per micro batch, in order; other stages get an empty list.
        """
        ...

    def head(self) -> Tensor | None:
        """This rank's rows of the reference's head [V, H] on the last stage, None on other stages."""
        ...

    def held(self) -> ReferenceBytes:
        """What it costs in memory on this rank, between steps."""
        ...
