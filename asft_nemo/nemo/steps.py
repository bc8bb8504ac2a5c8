"""What happens to one micro batch: taken from the iterator, handed to the model with what the loss reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from asft_nemo.data.context_slices import segment_bounds
from asft_nemo.nemo.context_parallel import slice_batch
from asft_nemo.nemo.head import LossInputs
from asft_nemo.nemo.packed_attention import attention_arguments
from asft_nemo.planner.flops import causal_pairs
from asft_nemo.profiling.rooms import room

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "segment_ids", "domain_id")


def unwrap_batch(item: Any) -> dict[str, Any]:
    """The micro batch itself: Lightning's iterator yields ``(batch, batch_idx, dataloader_idx)``."""
    return item[0] if isinstance(item, tuple) else item


def data_step(dataloader_iter: Iterator[Any]) -> dict[str, Any]:
    """Takes the next micro batch, cuts out this context-parallel rank's part and moves its tensors to this rank's device.

    Keys it does not know are kept. A micro batch that was here before comes back as it is.

    Returns:
        ``tokens``, ``labels``, ``position_ids`` int64 [B, Q], Q being this rank's S / cp_size tokens, ``loss_mask`` bool [B, Q],
        ``segment_ids`` int64 [B, Q] where examples are packed, ``domain_id`` int64 [B], the training file of each, ``attention``, what
        keeps packed examples apart, ``attended``, this rank's share of the pairs that attention computes (see `causal_pairs`), and, on the
        last stage, what the prepass put there (see `asft_nemo.nemo.prepass`).
    """
    with room("data"):
        batch = unwrap_batch(next(dataloader_iter))
        return batch if "attention" in batch else _on_this_rank(batch)


def _on_this_rank(batch: dict[str, Any]) -> dict[str, Any]:
    """A new micro batch as `data_step` returns it."""
    device, cp_size = torch.cuda.current_device(), parallel_state.get_context_parallel_world_size()
    cp_rank = parallel_state.get_context_parallel_rank()
    attention = attention_arguments(batch.get("segment_ids"), cp_rank=cp_rank, cp_size=cp_size, device=device)
    attended = (
        attended_pairs(batch["tokens"], batch.get("segment_ids")) / cp_size
    )  # chunks are cut so that ranks share alike
    if cp_size > 1:
        batch = slice_batch(batch, cp_rank=cp_rank, cp_size=cp_size)
    moved = {
        key: value.to(device, non_blocking=True) if key in BATCH_KEYS and isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
    return {**moved, "attention": attention, "attended": attended}


def attended_pairs(tokens_BS: Tensor, segment_ids_BS: Tensor | None) -> float:
    """Pairs of a query and a key of a micro batch of whole rows, each row or packed example by itself; no wait for a device.

    Args:
        tokens_BS: int64 [B, S].
        segment_ids_BS: int64 [B, S] on the host, None where rows are not packed.
    """
    if segment_ids_BS is None:
        return causal_pairs([tokens_BS.shape[1]] * tokens_BS.shape[0])
    return sum(causal_pairs(segment_bounds(row_S).diff().tolist()) for row_S in segment_ids_BS)


def forward_step(model: Any, batch: dict[str, Any]) -> Any:
    """Runs the model on one micro batch.

    Returns:
        The pipeline's hidden states, or on the last stage the `LossOutput`.
    """
    inputs = LossInputs(
        labels_BS=batch["labels"],
        loss_mask_BS=batch["loss_mask"],
        ref_hidden_SBH=batch.get("ref_hidden"),
        ref_head_VH=batch.get("ref_head"),
        ref_logprob_BS=batch.get("ref_logprob"),
        old_logprob_BS=batch.get("old_logprob"),
        segment_ids_BS=batch.get("segment_ids"),
    )
    with room("forward"):
        return model(
            input_ids=batch["tokens"], position_ids=batch["position_ids"], **batch["attention"], labels=inputs
        )
