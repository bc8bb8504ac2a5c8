"""Bytes in host memory for each GPU: what `optim.cpu_offload` moves there."""

from __future__ import annotations

from collections.abc import Sequence

from asft_nemo.config.schema import RunConfig
from asft_nemo.model.spec import ModelSpec
from asft_nemo.planner.parameters import rank_tensors
from asft_nemo.planner.stages import Chunk

_FP32 = 4


def pinned_bytes(size: int) -> int:
    """What torch takes of pinned host memory for one tensor: the next power of two (`CachingHostAllocatorImpl::allocate`, torch 2.13)."""
    return 1 << (size - 1).bit_length()


def optimizer_host_bytes(
    run: RunConfig, spec: ModelSpec, chunks: Sequence[Chunk], *, moved: int, state: int, shards: int
) -> int:
    """Masters, moments and gradients of the `moved` parameters of one rank (`HybridDeviceOptimizer`, megatron-core 0.15.3).

    Masters and moments are pageable. Each tensor's fp32 gradients are in pinned memory of their own; which tensors are moved, and where
    data-parallel ranks cut them, is not looked at: on average all tensors of the rank lose as much as whole ones do.

    Args:
        run, spec: settings, architecture.
        chunks: of the rank.
        moved: parameters, before ranks share them.
        state: bytes of a parameter's master and moments.
        shards: ranks that share them.
    """
    if not moved:
        return 0
    sizes = rank_tensors(spec, run.peft, chunks, tp_size=run.parallel.tp_size)
    gradients = sum(_FP32 * numbers * count for numbers, count in sizes)
    pinned = sum(pinned_bytes(_FP32 * numbers) * count for numbers, count in sizes)
    return moved * (state * gradients + _FP32 * pinned) // gradients // shards
