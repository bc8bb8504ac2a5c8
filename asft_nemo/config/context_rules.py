"""Rules about context parallelism, rows of the table of `asft_nemo.config.rules`."""

from __future__ import annotations

import math
from collections.abc import Iterator

from asft_nemo.config import tables
from asft_nemo.config.facts import Facts, Rule


def _whole_sequences(facts: Facts) -> Iterator[str]:
    known, cp_size = tables.OBJECTIVES.get(facts.run.objective.name), facts.run.parallel.cp_size
    if known is not None and known.whole_sequences and cp_size > 1:
        yield (
            f"objective={facts.run.objective.name} weighs whole sequences, and parallel.cp_size={cp_size} splits them: set "
            "parallel.cp_size=1"
        )


def _chunks(facts: Facts) -> Iterator[str]:
    """A rank takes two chunks of 2 * cp_size; sequence parallelism divides these tokens once more."""
    layout, length = facts.run.parallel, facts.run.data.sequence_length
    if layout.cp_size < 2 or layout.tp_size < 1:
        return
    share = math.lcm(2, layout.tp_size) if layout.sequence_parallel else 2
    unit = layout.cp_size * share
    if length % unit:
        why = f"parallel.cp_size={layout.cp_size}"
        if share > 2:
            why += f" with tp_size={layout.tp_size} and sequence_parallel"
        yield (
            f"data.sequence_length={length} is not a multiple of {unit}, which {why} needs: set "
            f"data.sequence_length={math.ceil(length / unit) * unit}"
        )


CONTEXT: tuple[Rule, ...] = (_whole_sequences, _chunks)
