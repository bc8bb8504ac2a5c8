"""Which tokens of a row each context-parallel rank takes.

Attention is causal, so a token costs as much as it has predecessors. A sequence is cut into ``2 * cp_size`` equal chunks and rank r takes
chunk r and chunk ``2 * cp_size - 1 - r``: equal work for all ranks (`get_batch_on_this_cp_rank`, megatron-core 0.15.3). In a packed row
every segment is cut like this by itself, and a rank's chunks lie one behind the other in the order of the segments, which is what
Transformer Engine's THD attention (`thd_partition_indices_kernel`, Transformer Engine 2.x) and Megatron's rotary embeddings
(`_get_thd_freqs_on_this_cp_rank`, megatron-core 0.15.3) expect.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_multiple(cp_size: int) -> int:
    """What the length of a segment must be a multiple of, so that `cp_size` ranks can share it."""
    return 1 if cp_size == 1 else 2 * cp_size


def segment_bounds(segment_ids_S: Tensor) -> Tensor:
    """Where the segments of a row begin, and its end: int64 [segments + 1], strictly increasing from 0 to S.

    Args:
        segment_ids_S: int64 [S], equal for the tokens of one segment, which are neighbours.
    """
    starts = (segment_ids_S[1:] != segment_ids_S[:-1]).nonzero().flatten() + 1
    ends = starts.new_tensor([0]), starts.new_tensor([len(segment_ids_S)])
    return torch.cat([ends[0], starts, ends[1]])


def positions_of_ranks(bounds: Tensor, cp_size: int) -> Tensor:
    """The places in a row of the tokens that each rank takes, in the order in which it has them.

    Args:
        bounds: int64 [segments + 1], the cumulative lengths of the segments, padding included (``cu_seqlens_padded``).
        cp_size: number of ranks.

    Returns:
        int64 [cp_size, S / cp_size]: every place once.

    Raises:
        ValueError: a segment's length is no multiple of `segment_multiple`.
    """
    lengths = bounds.diff()
    if cp_size == 1:
        return torch.arange(int(bounds[-1]), device=bounds.device).unsqueeze(0)
    if bool((lengths % (2 * cp_size)).any()):
        raise ValueError(
            f"segments of {lengths.tolist()} tokens cannot be shared by {cp_size} ranks: each must be a multiple of {2 * cp_size}"
        )
    # The chunks of one segment are equal: a token's chunk is its place in the segment over the length of a chunk.
    length_S = lengths.repeat_interleave(lengths)
    within_S = torch.arange(len(length_S), device=bounds.device) - bounds[:-1].repeat_interleave(lengths)
    chunk_S = within_S // (length_S // (2 * cp_size))
    rank_S = torch.minimum(chunk_S, 2 * cp_size - 1 - chunk_S)
    # A stable sort keeps the row's order in each rank; every rank has as many tokens.
    return rank_S.sort(stable=True).indices.view(cp_size, -1)
