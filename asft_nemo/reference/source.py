"""What a reference is, whatever holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class ReferenceSource(Protocol):
    """The reference's hidden states for a step's micro batches, and its head.

    Implementations never change, are outside the policy's module tree (no optimizer, no DDP bucket, no checkpoint sees them), run
    without gradients and without dropout.
    """

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
