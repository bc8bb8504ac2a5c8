"""Context parallelism: a rank holds a part of every sequence's tokens, and attention sees the keys and values of the others.

`asft_nemo.data.context_slices` says which tokens a rank takes. Everything but attention works on tokens one by one: embeddings, layers, the
loss and the reference's hidden states are those of this rank's tokens, sums and counts are added up over data-parallel and
context-parallel ranks together, as Megatron does with ``calculate_per_token_loss`` (`finalize_model_grads`, megatron-core 0.15.3).

Transformer Engine's attention exchanges keys and values in a ring. Megatron's own attention refuses context parallelism;
`GatheredAttention` is that attention behind an all-gather, which is exact and holds whole keys, values and rows of scores: for showing and
testing on CPUs.

Shapes: B micro batch, S sequence, Q this rank's S / cp_size tokens, N heads, G key/value heads, D head size, both of this tensor-parallel rank.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from asft_nemo.data.context_slices import positions_of_ranks, segment_bounds

SLICED = ("tokens", "labels", "loss_mask", "position_ids", "segment_ids", "sample_id")


def slice_batch(batch: dict[str, Any], *, cp_rank: int, cp_size: int) -> dict[str, Any]:
    """This rank's part of a micro batch.

    Args:
        batch: tensors [B, S] under the keys of `SLICED`, B = 1 where `segment_ids` says that rows are packed; others are kept.
        cp_rank, cp_size: of the context-parallel group.

    Returns:
        The same with tensors [B, Q].

    Raises:
        ValueError: the sequence, or a segment of it, cannot be shared by `cp_size` ranks.
    """
    own_Q = ranks_positions(batch, cp_size)[cp_rank]
    return {
        key: value[:, own_Q] if key in SLICED and isinstance(value, Tensor) and value.ndim == 2 else value
        for key, value in batch.items()
    }


def ranks_positions(batch: dict[str, Any], cp_size: int) -> Tensor:
    """The places in the row of every rank's tokens, int64 [cp_size, Q]. Arguments: see `slice_batch`."""
    segment_ids_BS = batch.get("segment_ids")
    if segment_ids_BS is None:
        return positions_of_ranks(torch.tensor([0, batch["tokens"].shape[1]]), cp_size)
    if len(segment_ids_BS) != 1:
        raise ValueError(
            f"{len(segment_ids_BS)} packed rows in a micro batch: they are cut at different places"
        )
    return positions_of_ranks(segment_bounds(segment_ids_BS[0]), cp_size)


def hidden_from_rank(positions_RQ: Tensor, segment_ids_S: Tensor | None, cp_rank: int) -> Tensor:
    """True where a token of this rank (dim 2) must not look at another (dim 3): bool [1, 1, Q, S], as Megatron masks.

    Args:
        positions_RQ: every rank's places, int64 [cp_size, Q]; the keys are gathered in this order.
        segment_ids_S: the segment of each place of the row, None where the row is one sequence.
        cp_rank: of the context-parallel group.
    """
    own_Q, all_S = positions_RQ[cp_rank], positions_RQ.flatten()
    hidden_QS = all_S > own_Q[:, None]
    if segment_ids_S is not None:
        hidden_QS |= segment_ids_S[all_S] != segment_ids_S[own_Q][:, None]
    return hidden_QS[None, None]


@functools.lru_cache(maxsize=4)
def _causal(length: int, cp_rank: int, cp_size: int, device: torch.device) -> Tensor:
    positions_RQ = positions_of_ranks(torch.tensor([0, length]), cp_size)
    return hidden_from_rank(positions_RQ, None, cp_rank).to(device)


class GatheredAttention(DotProductAttention):
    """Megatron's attention over the keys and values of all context-parallel ranks.

    Collectives: over the context-parallel group one all-gather of the keys and one of the values, [Q, B, G, D] each; in backward a
    reduce-scatter of their gradients. Memory: keys, values and their gradients of the whole sequence, and scores [B, N, Q, S].

    Arguments: see `DotProductAttention`, which refuses a config that asks for context parallelism and so gets a copy that does not.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)
        self.config = config
        self.cp_group: Any = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """The context [Q, B, N * D] of this rank's queries.

        Args:
            query, key, value: [Q, B, N or G, D]; of a packed row [Q, N or G, D], as Transformer Engine's THD attention gets them.
            attention_mask: see `hidden_from_rank`; None is causal over one sequence.
            packed_seq_params: only whether there are any is looked at; the mask says what belongs together.
            args, kwargs: as Megatron's.
        """
        if packed_seq_params is not None:
            query, key, value = (part.unsqueeze(1) for part in (query, key, value))
        key, value = (_gathered(part, self.cp_group) for part in (key, value))
        if attention_mask is None:
            attention_mask = _causal(len(key), self.cp_group.rank(), self.cp_group.size(), key.device)
        return super().forward(query, key, value, attention_mask, *args, **kwargs)


def _gathered(part_QBGD: Tensor, group: Any) -> Tensor:
    """All ranks' parts, one behind the other: [S, B, G, D]. The gradient is the sum of all ranks', scattered."""
    return gather_from_sequence_parallel_region(part_QBGD.contiguous(), group=group)
