"""Host memory of an offloaded reference: what torch's pinned allocator makes of its blocks, and that bytes come back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from asft_nemo.config.schema import PeftConfig
from asft_nemo.planner.parameters import rank_tensors
from asft_nemo.planner.published import published_spec
from asft_nemo.planner.stages import Chunk
from asft_nemo.reference import pinned
from asft_nemo.reference.pinned import PinnedMemory, block_sizes, bytes_of


def as_torch_allocates(size: int) -> int:
    """The next power of two (`CachingHostAllocatorImpl::allocate`, torch 2.13)."""
    return 1 << (size - 1).bit_length()


@pytest.mark.parametrize("size", [1, 4096, 4097, 10_880, 2**30, 2**30 + 1, 4_701_472_768])
def test_blocks_are_powers_of_two_that_hold_all_and_less_than_a_page_more(size: int) -> None:
    blocks = block_sizes(size)
    assert [as_torch_allocates(block) for block in blocks] == blocks
    assert size <= sum(blocks) < size + 4096


def test_a_layer_of_7b_takes_what_its_weights_take() -> None:
    """Qwen2.5-7B at TP2: the weights of a layer, each in its own pinned memory, would take 416 MiB; they are 222."""
    sizes = rank_tensors(published_spec("Qwen/Qwen2.5-7B"), PeftConfig(), [Chunk(1, False, False)], tp_size=2)
    weights = [2 * numbers for numbers, count in sizes for _ in range(count)]
    assert sum(weights) / 2**20 == pytest.approx(222.3, abs=0.1)
    assert sum(map(as_torch_allocates, weights)) / 2**20 == pytest.approx(416, abs=0.1)
    assert sum(map(as_torch_allocates, block_sizes(sum(weights)))) - sum(weights) < 4096


def test_tensors_lie_one_behind_the_other_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "_PAGE", 64)
    _on_cpu(monkeypatch)
    tensors = [torch.randn(7, 5), torch.randn(33).bfloat16(), torch.randint(0, 255, (3,), dtype=torch.uint8)]
    memory = PinnedMemory(sum(t.nbytes for t in tensors))
    assert [block.nbytes for block in memory._blocks] == [256]
    memory = PinnedMemory(sum(t.nbytes for t in tensors) + 150)
    assert [block.nbytes for block in memory._blocks] == [256, 128]
    taken = [memory.take(t.nbytes) for t in [*tensors, torch.empty(150, dtype=torch.uint8)]]
    assert [[part.nbytes for part in parts] for parts in taken] == [[140], [66], [3], [47, 103]]
    for tensor, parts in zip(tensors, taken[:-1], strict=True):
        parts[0].copy_(bytes_of(tensor))
    for tensor, parts in zip(tensors, taken[:-1], strict=True):
        assert torch.equal(parts[0], bytes_of(tensor))
    assert memory.nbytes == 384


def test_more_than_it_was_made_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _on_cpu(monkeypatch)
    memory = PinnedMemory(4096)
    memory.take(4000)
    with pytest.raises(RuntimeError, match="104 bytes more"):
        memory.take(200)


def test_bytes_follow_their_storage() -> None:
    tensor = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    seen = bytes_of(tensor)
    kept = seen.clone()
    tensor.untyped_storage().resize_(0)
    tensor.untyped_storage().resize_(seen.nbytes)
    seen.copy_(kept)
    assert torch.equal(tensor, torch.arange(6, dtype=torch.float64).reshape(2, 3))


def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pageable memory: there is no pinned one without a GPU."""
    empty = torch.empty

    def pageable(*shape: Any, pin_memory: bool = False, **given: Any) -> torch.Tensor:
        return empty(*shape, **given)

    monkeypatch.setattr(torch, "empty", pageable)
