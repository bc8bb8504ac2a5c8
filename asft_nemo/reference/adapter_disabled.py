"""The reference for free: the policy's own base weights, with its adapters off."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from asft_nemo.reference.frozen import frozen_config
from asft_nemo.reference.prepass import forward_hidden
from asft_nemo.reference.source import ReferenceBytes, ReferenceSource


@contextlib.contextmanager
def as_reference(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Within it the policy's chunks run like a reference's.

    They are in evaluation mode (no dropout is drawn), the last stage returns final hidden states, and the schedule sees a config
    without the policy's communication hooks.
    """
    policy: list[Any] = list(chunks)
    before = [(chunk.training, chunk.returns_hidden, chunk.config) for chunk in policy]
    try:
        for chunk in policy:
            chunk.eval()
            chunk.returns_hidden = True
            chunk.config = frozen_config(chunk.config)
        yield
    finally:
        for chunk, (training, returns_hidden, config) in zip(policy, before, strict=True):
            chunk.train(training)
            chunk.returns_hidden = returns_hidden
            chunk.config = config


class AdapterDisabledReference(ReferenceSource):
    """The policy with its adapters off, which is the base as long as nothing else is trained.

    No second copy and no weights of its own: it costs one forward pass. Same layers, same kernels, same shapes as the policy's, so the
    KL before the first update is exactly 0.

    Args:
        chunks: this rank's chunks of the policy without wrappers, in the order of the virtual stages. DDP's hooks are on their layers
            and wait for no parameter here: it knows adapters only, and these are not run.
        adapters_off: a context in which the chunks' adapters do nothing.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        adapters_off: Callable[[Sequence[nn.Module]], contextlib.AbstractContextManager[None]],
    ):
        self.chunks = list(chunks)
        self._adapters_off = adapters_off

    def hidden(
        self, micro_batches: Sequence[dict[str, Any]], *, sequence_length: int, micro_batch_size: int
    ) -> list[Tensor]:
        """See `ReferenceSource.hidden`."""
        with self._adapters_off(self.chunks), as_reference(self.chunks):
            return forward_hidden(
                self.chunks,
                micro_batches,
                sequence_length=sequence_length,
                micro_batch_size=micro_batch_size,
            )

    def head(self) -> Tensor | None:
        """See `ReferenceSource.head`: the policy's own head, which is frozen."""
        last: Any = self.chunks[-1]
        return last.head_weight().detach() if last.post_process else None

    def held(self) -> ReferenceBytes:
        """See `ReferenceSource.held`: nothing."""
        return ReferenceBytes()
