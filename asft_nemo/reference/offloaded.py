"""A frozen model whose weights wait in host memory: on the device only while the prepass runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asft_nemo.reference.frozen import FrozenBase, stored_tensors
from asft_nemo.reference.pinned import PinnedMemory, bytes_of
from asft_nemo.reference.source import ReferenceBytes

logger = logging.getLogger(__name__)


@dataclass
class _Parked:
    """One module's own parameters, as the bytes of the tensors that hold them, and their copies in host memory, each in one part or more.

    The tensors stay what they are and lose their storage: an FP8 weight cannot be given another tensor without being quantised again.

    Of bf16 weights that it multiplies in FP8 Transformer Engine keeps an FP8 copy from a pass's first micro batch on
    (`get_weight_workspace`, transformer_engine/pytorch/module/base.py, 2.x), for good: it leaves with the weights, and is made again.
    """

    module: nn.Module
    device: list[Tensor]
    host: list[list[Tensor]]
    arrived: torch.cuda.Event | None = None

    def fill(self) -> None:
        """Copies what the device holds to host memory."""
        for there, here in self._parts():
            here.copy_(there)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every part's bytes on the device and in host memory."""
        for tensor, host in zip(self.device, self.host, strict=True):
            yield from zip(tensor.split([part.nbytes for part in host]), host, strict=True)

    def allocate(self) -> None:
        """Makes room on the device, from the current stream's memory."""
        for tensor in self.device:
            tensor.untyped_storage().resize_(tensor.nbytes)

    def send(self, stream: torch.cuda.Stream) -> None:
        """Starts the copies to the device on `stream`, the current one."""
        for there, here in self._parts():
            there.copy_(here, non_blocking=True)
        self.arrived = torch.cuda.Event()
        self.arrived.record(stream)

    def wait(self) -> None:
        """Makes the current stream wait for the copies; nothing after the first call of a pass."""
        if self.arrived is not None:
            self.arrived.wait(torch.cuda.current_stream())
            self.arrived = None

    def leave(self) -> None:
        """Frees the device's copies."""
        for tensor in self.device:
            tensor.untyped_storage().resize_(0)
        getattr(self.module, "_fp8_workspaces", {}).clear()
        self.arrived = None


class OffloadedReference(FrozenBase):
    """Frozen chunks with the base checkpoint's weights, in pinned host memory between the prepasses.

    A prepass starts all copies in the order of the layers on a stream of their own; each layer waits for its weights alone, so that
    later copies run beside the first micro batches. After the last micro batch the device's copies are freed, before the policy's
    activations grow: its peak should be that of training without a reference, where activations take as much as the stage's weights
    (`tools/gpu_check.py` measures it; no GPU has yet). The
    head stays on the device (last stage only), for the loss reads it during the step.

    Host memory: 2 (bf16), 4 (fp32) or 1 (FP8) bytes per parameter of this rank but the head's, rounded up to a page (`PinnedMemory`). The
    copies are exact: hidden states equal a resident reference's bit for bit.

    Args:
        build_chunk, vp_size, weights_dir, dtype: see `FrozenBase`.
    """

    def __init__(
        self,
        build_chunk: Callable[[int | None], nn.Module],
        *,
        vp_size: int | None,
        weights_dir: Path,
        dtype: torch.dtype,
    ):
        super().__init__(build_chunk, vp_size=vp_size, weights_dir=weights_dir, dtype=dtype)
        last: Any = self.chunks[-1]
        self._head_VH: Tensor | None = last.head_weight() if last.post_process else None
        self._copies = torch.cuda.Stream()
        with torch.no_grad():
            modules = list(self._modules())
            self._memory = PinnedMemory(sum(t.nbytes for module in modules for t in self._stored(module)))
            self._parked = [self._park(module, self._memory) for module in modules]
            for parked in self._parked:
                parked.leave()
        held = self.held()
        logger.info(
            "offloaded reference: %d bytes of this rank in host memory, %d on the device",
            held.host,
            held.device,
        )

    def _modules(self) -> Iterator[nn.Module]:
        """Modules with parameters that do not stay, in the order of the forward pass."""
        for chunk in self.chunks:
            for module in chunk.modules():
                if self._own(module):
                    yield module

    def _own(self, module: nn.Module) -> list[nn.Parameter]:
        """A module's own parameters without the head, which in a tied model is the embedding."""
        return [p for p in module.parameters(recurse=False) if p is not self._head_VH]

    def _stored(self, module: nn.Module) -> list[Tensor]:
        return [tensor for parameter in self._own(module) for tensor in stored_tensors(parameter)]

    def _park(self, module: nn.Module, memory: PinnedMemory) -> _Parked:
        stored = self._stored(module)
        if any(tensor.untyped_storage().nbytes() != tensor.nbytes for tensor in stored):
            raise RuntimeError(
                f"a parameter of {type(module).__name__} shares its memory: it cannot be offloaded"
            )
        parked = _Parked(module, [bytes_of(t) for t in stored], [memory.take(t.nbytes) for t in stored])
        parked.fill()
        module.register_forward_pre_hook(lambda *_: parked.wait())
        return parked

    def hidden(
        self, micro_batches: Sequence[dict[str, Any]], *, sequence_length: int, micro_batch_size: int
    ) -> list[Tensor]:
        """See `ReferenceSource.hidden`. The weights come for it and leave after it, also when it fails."""
        compute = torch.cuda.current_stream()
        try:
            for parked in self._parked:
                parked.allocate()
            self._copies.wait_stream(compute)  # what used this memory before has finished
            with torch.no_grad(), torch.cuda.stream(self._copies):
                for parked in self._parked:
                    parked.send(self._copies)
            return super().hidden(
                micro_batches, sequence_length=sequence_length, micro_batch_size=micro_batch_size
            )
        finally:
            compute.wait_stream(self._copies)  # a layer that did not run must not be written to after this
            for parked in self._parked:
                parked.leave()

    def head(self) -> Tensor | None:
        """See `ReferenceSource.head`; it never leaves the device."""
        return None if self._head_VH is None else self._head_VH.detach()

    def held(self) -> ReferenceBytes:
        """See `ReferenceSource.held`."""
        head = 0 if self._head_VH is None else self._head_VH.nbytes
        return ReferenceBytes(device=head, host=self._memory.nbytes)
