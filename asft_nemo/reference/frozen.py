"""Frozen model chunks in the policy's layout: what a resident reference and a snapshot of the policy are made of."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor, nn

from asft_nemo.checkpoint.dist_read import check_before_load
from asft_nemo.reference.prepass import forward_hidden
from asft_nemo.reference.source import ReferenceBytes, ReferenceSource

logger = logging.getLogger(__name__)

# What the policy's config carries for its own gradients and parameters; the reference has neither.
_TRAINING_HOOKS = (
    "no_sync_func",
    "grad_sync_func",
    "param_sync_func",
    "finalize_model_grads_func",
    "grad_scale_func",
    "timers",
)


def frozen_config(config: Any) -> Any:
    """A copy of the policy's config without its training hooks, so that the prepass cannot start the policy's communication.

    What NeMo serialises of a config (`__io__`) is copied too: overriding the copy's dtypes writes into it, and the policy's checkpoints
    would otherwise tell the reference's precision.
    """
    frozen = copy.copy(config)
    if hasattr(frozen, "__io__"):
        frozen.__io__ = copy.deepcopy(frozen.__io__)
    for hook in _TRAINING_HOOKS:
        if hasattr(frozen, hook):
            setattr(frozen, hook, None)
    return frozen


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """Drops Transformer Engine's `_extra_state` objects, which a base checkpoint has not.

    bf16 and fp32 layers need none. FP8 with current scaling needs none either: `get_extra_state` (transformer_engine/pytorch/module/
    base.py, Transformer Engine 2.8) holds the scales and amax histories of delayed scaling alone beside the recipe's name, and
    `_load_from_state_dict` reads it only where the state has it.
    """
    return {
        key: value
        for key, value in state.items()
        if not (isinstance(value, ShardedObject) or "_extra_state" in key)
    }


def stored_tensors(parameter: nn.Parameter) -> list[Tensor]:
    """The tensors that hold a parameter's numbers: itself, or the raw FP8 data behind a weight of Transformer Engine.

    Such a weight (`QuantizedTensor.get_data_tensors`, Transformer Engine 2.x) gives the dtype and `nbytes` of what it stands for.
    Its scales, one number or one in 128 x 128, are not counted.
    """
    raw = getattr(parameter, "get_data_tensors", None)
    return [parameter.data] if raw is None else [tensor for tensor in raw() if tensor is not None]


class FrozenChunks(ReferenceSource):
    """This rank's model chunks for forward passes without gradients, in the policy's compute dtype and layout.

    The chunks live in this object only: no LightningModule, optimizer, DDP wrapper or checkpoint of the policy holds them. Memory:
    2 (bf16) or 4 (fp32) bytes per parameter of this rank; no activations are kept. Their weights are those of the initialisation
    until `load_weights` or a subclass sets them.

    In FP8 a linear layer's parameter takes 1 byte: chunks are built under no_grad, without which Transformer Engine would keep a
    transposed copy for the backward pass as well (`reset_parameters` in transformer_engine/pytorch/module/base.py).

    Args:
        build_chunk: builds one chunk for a virtual stage (None without virtual stages); its last stage returns hidden states.
        vp_size: virtual stages of this rank, None for none.
        dtype: the policy's compute dtype.
    """

    def __init__(
        self, build_chunk: Callable[[int | None], nn.Module], *, vp_size: int | None, dtype: torch.dtype
    ):
        stages: list[int | None] = [None] if vp_size is None else list(range(vp_size))
        self.chunks: list[nn.Module] = []
        with torch.no_grad():
            for stage in stages:
                chunk = build_chunk(stage).to(dtype=dtype, device=torch.cuda.current_device())
                chunk.eval()
                # Not requires_grad_(False): torch.matmul and Megatron's linear layers choose other kernels for frozen weights (measured:
                # 1e-6 in the logits, so a KL of 1e-8 before the first update). Every pass runs under no_grad instead.
                self.chunks.append(chunk)

    @property
    def num_parameters(self) -> int:
        """Parameters of this rank."""
        return sum(p.numel() for chunk in self.chunks for p in chunk.parameters())

    def sharded_states(self) -> dict[str, Any]:
        """What Megatron's distributed checkpointing saves or loads of the chunks, under a checkpoint's names."""
        return {
            f"chunk_{index}": _without_extra_state(chunk.sharded_state_dict(prefix="module."))  # type: ignore[operator]
            for index, chunk in enumerate(self.chunks)
        }

    def load_weights(self, weights_dir: Path) -> None:
        """Reads the chunks' weights from a torch distributed checkpoint, written at any layout. Collective over all ranks.

        The checkpoint needs no `_extra_state`. FP8 weights are read as bf16 and quantised on their way into the parameter:
        `dist_checkpointing.load` replaces FP8 tensors of its request (`force_all_tensors_to_non_fp8`, megatron-core 0.15.3), and
        `copy_` into a weight of Transformer Engine quantises. While this lasts they take 2 bytes per parameter more.

        Raises:
            RuntimeError: tensors are missing or left over.
        """
        check_before_load(weights_dir, torch.distributed.get_rank(), torch.distributed.get_world_size())
        loaded: Any = dist_checkpointing.load(self.sharded_states(), str(weights_dir))
        for index, chunk in enumerate(self.chunks):
            state = {key.removeprefix("module."): value for key, value in loaded[f"chunk_{index}"].items()}
            missing, unexpected = chunk.load_state_dict(state, strict=False)
            missing = [key for key in missing if not key.endswith("_extra_state")]
            if missing or unexpected:
                raise RuntimeError(
                    f"weights in {weights_dir} do not fit the model: missing {missing}, unexpected {unexpected}"
                )

    def hidden(
        self, micro_batches: Sequence[dict[str, Any]], *, sequence_length: int, micro_batch_size: int
    ) -> list[Tensor]:
        """See `ReferenceSource.hidden`."""
        return forward_hidden(
            self.chunks, micro_batches, sequence_length=sequence_length, micro_batch_size=micro_batch_size
        )

    def held(self) -> ReferenceBytes:
        """See `ReferenceSource.held`."""
        parameters = (parameter for chunk in self.chunks for parameter in chunk.parameters())
        return ReferenceBytes(device=sum(t.nbytes for p in parameters for t in stored_tensors(p)))

    def head(self) -> Tensor | None:
        """See `ReferenceSource.head`."""
        last = self.chunks[-1]
        return last.head_weight().detach() if last.post_process else None  # type: ignore[operator]


class FrozenBase(FrozenChunks):
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
        logger.info("reference: %d parameters on this rank, from %s", self.num_parameters, weights_dir)
