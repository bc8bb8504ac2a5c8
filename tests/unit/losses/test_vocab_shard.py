"""Which rows a rank holds, and where a label lies in them."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from asft_nemo.errors import LayoutError
from asft_nemo.losses import VocabShard, vocab_shard


@given(vocab=st.integers(1, 300), world_size=st.integers(1, 8), extra=st.integers(0, 40))
def test_the_shards_cover_the_vocabulary_once(vocab, world_size, extra):
    padded = -(-(vocab + extra) // world_size) * world_size
    # The group is only used by collectives, which this test does not run.
    shards = [
        VocabShard.of_rank(rank, world_size, padded, vocab, group=object()) for rank in range(world_size)
    ]
    rows = [row for shard in shards for row in range(shard.start, shard.start + shard.num_valid)]
    assert rows == list(range(vocab))
    labels = torch.arange(vocab)
    owners = torch.stack([shard.local_index(labels)[0] for shard in shards])
    assert (owners.sum(dim=0) == 1).all()
    for shard in shards:
        own, index = shard.local_index(labels)
        assert torch.equal(index[own] + shard.start, labels[own])
        assert (index[~own] == 0).all()
        assert shard.num_valid_of_largest == shards[0].num_valid


def test_a_vocabulary_that_does_not_divide_is_refused():
    with pytest.raises(
        LayoutError, match="102 does not fit tensor parallel size 4: pad it to a multiple of 4"
    ):
        VocabShard.of_rank(0, 4, 102, 100, group=object())
    with pytest.raises(LayoutError, match="pass group="):
        VocabShard.of_rank(0, 2, 8, 8, None)
    with pytest.raises(LayoutError, match="rank 2 is not in a group of 2"):
        VocabShard.of_rank(2, 2, 8, 8, group=object())


def test_collectives_go_by_the_name_that_this_torch_has():
    assert vocab_shard._collective("all_reduce", "barrier") is dist.all_reduce
    assert vocab_shard._collective("of_a_later_torch", "all_reduce") is dist.all_reduce
