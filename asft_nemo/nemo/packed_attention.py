"""Keeps the examples of a packed row apart in attention."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from asft_nemo.nemo.layer_spec import uses_transformer_engine


def attention_arguments(segment_ids_BS: Tensor | None) -> dict[str, Any]:
    """What a model's forward gets beside tokens and positions.

    `attention_mask=None` means causal for every layer spec in use: padding is on the right, so no valid token sees it. Packed rows get a
    causal mask of blocks from Megatron's own layers; Transformer Engine's get the lengths (THD), and compute nothing outside the blocks.

    Args:
        segment_ids_BS: int64 [B, S], equal for the tokens of one example, which are neighbours; None where rows are not packed.
    """
    if segment_ids_BS is None:
        return {"attention_mask": None}
    if uses_transformer_engine():
        return {"attention_mask": None, "packed_seq_params": packed_lengths(segment_ids_BS)}
    return {"attention_mask": hidden_pairs(segment_ids_BS)}


def hidden_pairs(segment_ids_BS: Tensor) -> Tensor:
    """True where a token (dim 2) must not look at another (dim 3): bool [B, 1, S, S], as Megatron masks."""
    size = segment_ids_BS.shape[1]
    later_SS = torch.ones(size, size, dtype=torch.bool, device=segment_ids_BS.device).triu(1)
    other_BSS = segment_ids_BS[:, :, None] != segment_ids_BS[:, None, :]
    return (other_BSS | later_SS)[:, None]


def packed_lengths(segment_ids_BS: Tensor) -> PackedSeqParams:
    """Where the segments of one packed row begin, for Transformer Engine; a wait for the device.

    Raises:
        ValueError: more than one row: they would have to be one in the pipeline, too.
    """
    if segment_ids_BS.shape[0] != 1:
        raise ValueError(
            f"{segment_ids_BS.shape[0]} packed rows in a micro batch: Transformer Engine takes one"
        )
    ids_S = segment_ids_BS[0]
    starts = torch.cat([ids_S.new_ones(1, dtype=torch.bool), ids_S[1:] != ids_S[:-1]]).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([len(ids_S)])]).to(torch.int32)
    longest = int((bounds[1:] - bounds[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,  # type: ignore[arg-type]
        cu_seqlens_kv=bounds,  # type: ignore[arg-type]
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
