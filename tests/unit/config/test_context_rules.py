"""Context parallelism: which layouts, lengths and objectives it takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Violations = Callable[..., list[str]]
SP2 = ("parallel.tp_size=2", "parallel.sequence_parallel=true")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["objective=asft", "parallel.cp_size=4", "data.sequence_length=100"],
            "data.sequence_length=100 is not a multiple of 8, which parallel.cp_size=4 needs: set data.sequence_length=104",
        ),
        (
            ["objective=asft", "parallel.cp_size=3", "parallel.tp_size=1", "data.sequence_length=100"],
            "is not a multiple of 6, which parallel.cp_size=3 needs: set data.sequence_length=102",
        ),
        (
            ["objective=asft", "parallel.cp_size=2", *SP2, "data.sequence_length=101"],
            "data.sequence_length=101 is not a multiple of 4, which parallel.cp_size=2 needs: set data.sequence_length=104",
        ),
        (
            ["objective=iw_sft", "parallel.cp_size=2"],
            "objective=iw_sft weighs whole sequences, and parallel.cp_size=2 splits them: set parallel.cp_size=1",
        ),
    ],
)
def test_one_mistake_gives_one_sentence(violations: Violations, overrides: list[str], sentence: str) -> None:
    (found,) = violations(*overrides)
    assert sentence in found


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.cp_size=2"],
        ["parallel.cp_size=4", "data.packing=true", "trainer.micro_batch_size=1"],
        ["parallel.cp_size=2", "parallel.pp_size=2", *SP2, "data.sequence_length=36"],
        ["parallel.cp_size=2", "reference=cached", "reference.fill=first_epoch"],
    ],
)
def test_what_context_parallelism_takes(violations: Violations, overrides: list[str]) -> None:
    assert not violations("objective=asft", *overrides)
