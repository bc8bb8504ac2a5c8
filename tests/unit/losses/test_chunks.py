"""How many tokens a chunk has: within the byte budget, even, and the same on all ranks of a group."""

from typing import Any

import pytest
import torch
from loss_cases import variant_objective

from asft_nemo.losses import VocabShard
from asft_nemo.losses.chunks import resolve_chunk_tokens, token_chunks

MIB = 2**20
#: Device, and the bytes that "auto" may take for the [chunk, V] buffers there.
BUDGETS = [("cpu", 128 * MIB), ("cuda", 512 * MIB)]


def resolve(
    chunk_tokens, shard, *, tokens=100_000, name="asft", dtype=torch.float32, device="cpu", visits_head=True
) -> int:
    return resolve_chunk_tokens(
        chunk_tokens,
        num_tokens=tokens,
        objective=variant_objective(name, None),
        shard=shard,
        dtype=dtype,
        device=torch.device(device),
        visits_head=visits_head,
    )


@pytest.mark.parametrize(("device", "budget"), BUDGETS)
@pytest.mark.parametrize("vocab", [1000, 19008, 32768])
@pytest.mark.parametrize(("name", "buffers"), [("sft", 1), ("eaft", 1), ("asft", 3), ("sft_kl", 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_fills_the_budget_and_keeps_within_it(device, budget, vocab, name, buffers, dtype):
    """The fp32 (fp64) buffers of the objective, and the logit gradient once more in bf16."""
    bytes_per_token = vocab * (buffers * dtype.itemsize + 2)
    chunk = resolve("auto", VocabShard.full(vocab), name=name, dtype=dtype, device=device)
    assert chunk * bytes_per_token <= budget
    whole_chunks = -(-100_000 // (budget // bytes_per_token))
    assert -(-100_000 // chunk) == whole_chunks, "no more chunks than the budget asks for"


@pytest.mark.parametrize(("vocab", "tokens"), [(76_032, 512), (152_064, 504), (10**9, 1)])
def test_a_gpu_takes_twice_the_budget_for_the_sake_of_512_tokens(vocab, tokens):
    chunk = resolve("auto", VocabShard.full(vocab), tokens=tokens * 1000, device="cuda")
    assert chunk == tokens
    assert chunk == 1 or chunk * vocab * 14 <= 1024 * MIB
    within = 512 * MIB // (vocab * 14)
    assert resolve("auto", VocabShard.full(vocab), device="cuda", visits_head=False) <= max(within, 1)


def test_the_last_token_that_does_not_fit_whole_is_left_out():
    """1 GiB holds 504.4 tokens of this vocabulary: 504,300 tokens are 1001 chunks, not 1000 of 505 tokens."""
    assert resolve("auto", VocabShard.full(152_064), tokens=504_300, device="cuda") == 504


def test_a_vocabulary_beyond_the_budget_leaves_one_token():
    assert resolve("auto", VocabShard.full(300 * MIB)) == 1


@pytest.mark.parametrize(
    ("tokens", "asked", "found"), [(1000, 300, 250), (1000, 999, 500), (7, 1000, 7), (0, 5, 1)]
)
def test_chunks_are_evened_out(tokens, asked, found):
    assert resolve(asked, VocabShard.full(50), tokens=tokens) == found


def test_every_rank_of_a_group_has_the_same_chunks():
    """The last ranks hold padding, and each chunk is a collective."""
    group: Any = object()
    shards = [VocabShard.of_rank(rank, 4, 4 * 40_000, 90_000, group) for rank in range(4)]
    assert [shard.num_valid for shard in shards] == [40_000, 40_000, 10_000, 0]
    assert len({resolve("auto", shard) for shard in shards}) == 1


def test_chunks_cover_the_tokens_in_order():
    assert [(c.start, c.stop) for c in token_chunks(7, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert list(token_chunks(0, 3)) == []
