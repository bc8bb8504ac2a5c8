"""What one rank holds while several micro batches are between their forward and their backward pass, by Megatron's own schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table


@dataclass(frozen=True)
class ChunkBytes:
    """One micro batch through one model chunk.

    Attributes:
        kept: left behind by the forward pass until the backward pass.
        forward: the most that the forward pass holds, what it leaves behind included.
        backward: the most that the backward pass holds, what the forward pass left included.
    """

    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Flight:
    """The most of a step.

    Attributes:
        kept: bytes left behind by forward passes at a time.
        peak: bytes held at a time, passes that run included.
        passes: forward passes of chunks whose backward pass has not begun, at most.
    """

    kept: int
    peak: int
    passes: int


def step_of(chunks: Sequence[ChunkBytes], *, micro_batches: int, pp_size: int) -> Flight:
    """One step of this rank. The model-parallel groups must exist.

    Args:
        chunks: by virtual stage.
        micro_batches: of one step on one data-parallel rank.
        pp_size: pipeline stages; the size of a group of micro batches in the interleaved schedule.
    """
    kept = peak = passes = alive = running = 0
    for forward, index in _passes(len(chunks), micro_batches, pp_size):
        chunk = chunks[index]
        if forward:
            peak, alive, running = max(peak, alive + chunk.forward), alive + chunk.kept, running + 1
        else:
            alive, running = alive - chunk.kept, running - 1
            peak = max(peak, alive + chunk.backward)
        kept, passes = max(kept, alive), max(passes, running)
    return Flight(kept, peak, passes)


def _passes(num_chunks: int, micro_batches: int, pp_size: int) -> Iterator[tuple[bool, int]]:
    """(forward?, chunk) in the order in which this rank runs them."""
    order = [chunk for _, chunk in get_schedule_table(micro_batches, num_chunks, pp_size)]
    total, _, warm_up, _ = get_pp_rank_microbatches(micro_batches, num_chunks, pp_size)
    for index in range(total + warm_up):
        if index < total:
            yield True, order[index]
        if index >= warm_up:
            yield False, num_chunks - 1 - order[index - warm_up]
