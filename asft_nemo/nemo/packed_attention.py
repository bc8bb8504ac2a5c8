"""Keeps the examples of a packed row apart in attention."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from asft_nemo.data.context_slices import positions_of_ranks, segment_bounds
from asft_nemo.nemo.context_parallel import hidden_from_rank
from asft_nemo.nemo.layer_spec import uses_transformer_engine


def attention_arguments(
    segment_ids_BS: Tensor | None, *, cp_rank: int, cp_size: int, device: torch.device | int
) -> dict[str, Any]:
    """What a model's forward gets beside tokens and positions.

    `attention_mask=None` means causal for every layer spec in use: padding is on the right, so no valid token sees it. Packed rows get a
    causal mask of blocks from Megatron's own layers; Transformer Engine's get the lengths (THD), and compute nothing outside the blocks.
    Under context parallelism Megatron's own layers get both: positions are counted from the lengths, attention looks at the mask.

    Args:
        segment_ids_BS: int64 [B, S] of whole rows, equal for the tokens of one example, which are neighbours; None where rows are not packed.
        cp_rank, cp_size: of the context-parallel group.
        device: where the model is.
    """
    if segment_ids_BS is None:
        return {"attention_mask": None}
    if uses_transformer_engine():
        lengths = packed_lengths(segment_ids_BS, shared=cp_size > 1, device=device)
        return {"attention_mask": None, "packed_seq_params": lengths}
    if cp_size == 1:
        return {"attention_mask": hidden_pairs(segment_ids_BS.to(device))}
    positions_RQ = positions_of_ranks(segment_bounds(segment_ids_BS[0]), cp_size)
    return {
        "attention_mask": hidden_from_rank(positions_RQ, segment_ids_BS[0], cp_rank).to(device),
        "packed_seq_params": packed_lengths(segment_ids_BS, shared=True, device=device),
    }


def hidden_pairs(segment_ids_BS: Tensor) -> Tensor:
    """True where a token (dim 2) must not look at another (dim 3): bool [B, 1, S, S], as Megatron masks."""
    size = segment_ids_BS.shape[1]
    later_SS = torch.ones(size, size, dtype=torch.bool, device=segment_ids_BS.device).triu(1)
    other_BSS = segment_ids_BS[:, :, None] != segment_ids_BS[:, None, :]
    return (other_BSS | later_SS)[:, None]


def packed_lengths(segment_ids_BS: Tensor, *, shared: bool, device: torch.device | int) -> PackedSeqParams:
    """Where the segments of one packed row begin; no wait for the device where the row is on the host.

    Args:
        segment_ids_BS: see `attention_arguments`; one row.
        shared: between context-parallel ranks. Transformer Engine then insists on the lengths with padding, too
            (`attn_forward_func_with_cp`, 2.x). They are the same: what a segment is filled up with is on its right, where causal attention
            hides it from the example, and not learned. So kernels will do that know no padding between segments.
        device: where the model is.

    Raises:
        ValueError: more than one row: they would have to be one in the pipeline, too.
    """
    if segment_ids_BS.shape[0] != 1:
        raise ValueError(
            f"{segment_ids_BS.shape[0]} packed rows in a micro batch: Transformer Engine takes one"
        )
    bounds = segment_bounds(segment_ids_BS[0])
    longest = int(bounds.diff().max())
    lengths: Any = bounds.to(torch.int32).to(device, non_blocking=True)
    padded = {"cu_seqlens_q_padded": lengths, "cu_seqlens_kv_padded": lengths} if shared else {}
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        **padded,
    )
