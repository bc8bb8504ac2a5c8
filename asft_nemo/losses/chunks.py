"""How many tokens at a time: chunks bounded in bytes, of nearly equal length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch

from asft_nemo.errors import ConfigError
from asft_nemo.losses.vocab_shard import VocabShard
from asft_nemo.objectives import Objective

#: "auto" or a number of tokens.
ChunkTokens: TypeAlias = int | str

#: Bytes of [chunk, V] buffers that "auto" allows. A GPU's matrix units need about 2048 rows to be busy; a CPU
#: wants enough tokens to pay for the visit of the head gradient that each chunk makes.
CUDA_CHUNK_BYTES = 512 * 2**20
CPU_CHUNK_BYTES = 128 * 2**20
#: For so many tokens "auto" goes to twice the bytes: with fewer, reading and writing the head's fp32 gradient takes
#: longer than the product that is added to it. Per row of the head, 8 H bytes against 2 N H operations: at an H100's
#: 3.35 TB/s and some 700 TFLOP/s both take the same time with N = 840 tokens.
CUDA_LEAST_TOKENS = 512


def bytes_per_token(objective: Objective, shard: VocabShard, dtype: torch.dtype) -> int:
    """Bytes a token takes in a chunk's buffers.

    Both models' logits and their difference, or the policy's alone, in `dtype`, and a bf16 copy of the logit
    gradient for the matrix units.
    """
    buffers = 3 if objective.divergence else 1
    return shard.num_valid_of_largest * (buffers * dtype.itemsize + 2)


def resolve_chunk_tokens(
    chunk_tokens: ChunkTokens,
    *,
    num_tokens: int,
    objective: Objective,
    shard: VocabShard,
    dtype: torch.dtype,
    device: torch.device,
    visits_head: bool,
) -> int:
    """Tokens per chunk: as asked, or as many as the byte budget allows. The same on all ranks of the group.

    Args:
        chunk_tokens: "auto" or a number of at least 1.
        num_tokens: tokens to visit; chunks are evened out over them.
        dtype: of the logit buffers.
        visits_head: every chunk adds to the head's gradient, which is worth more bytes on a GPU.

    Raises:
        ConfigError: a number below 1.
    """
    if chunk_tokens == "auto":
        a_token = bytes_per_token(objective, shard, dtype)
        budget = CUDA_CHUNK_BYTES if device.type == "cuda" else CPU_CHUNK_BYTES
        largest = max(budget // a_token, 1)
        if visits_head and device.type == "cuda":
            largest = max(largest, min(CUDA_LEAST_TOKENS, 2 * budget // a_token))
    elif isinstance(chunk_tokens, int) and not isinstance(chunk_tokens, bool) and chunk_tokens >= 1:
        largest = chunk_tokens
    else:
        raise ConfigError(
            f"loss.chunk_tokens={chunk_tokens!r} leaves nothing to compute: set it to auto or to a "
            f"whole number of at least 1"
        )
    chunks = max(-(-num_tokens // largest), 1)
    return max(-(-num_tokens // chunks), 1)


def token_chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Slices that cover the tokens in order; none where there are no tokens."""
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))
