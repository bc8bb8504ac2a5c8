"""Shares of layers that Megatron would refuse late, or not at all; recomputing more layers than a stage has."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Violations = Callable[..., tuple[str, ...]]

PP2 = ("objective=asft", "parallel.pp_size=2")  # of tiny-base's 4 layers
VPP2 = (*PP2, "parallel.vpp_size=2")
FULL = "recompute.granularity=full"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("objective=asft", "parallel.last_stage_layers=1"),
            "parallel.last_stage_layers does nothing at pp_size=1",
        ),
        (
            ("objective=asft", "parallel.account_for_loss=true"),
            "parallel.account_for_loss does nothing at pp_size=1",
        ),
        (
            (*PP2, "parallel.last_stage_layers=1", "parallel.account_for_embedding=true"),
            "parallel.last_stage_layers and parallel.account_for_embedding are two ways to share out the layers",
        ),
        (
            (*PP2, "parallel.account_for_loss=true"),
            "does not divide the model's 4 layers and the loss: choose them so that their product is one of 1, 5",
        ),
        (
            (
                *PP2,
                "parallel.vpp_size=3",
                "parallel.account_for_loss=true",
                "parallel.account_for_embedding=true",
            ),
            "parallel.account_for_embedding=true leaves a stage without a layer",
        ),
        (
            (*PP2, "parallel.first_stage_layers=3", "parallel.last_stage_layers=1"),
            "name every stage, and each follows from the other: leave parallel.last_stage_layers out",
        ),
        ((*PP2, "parallel.last_stage_layers=4"), "leaves 0 of the model's 4 layers to 1 other stages"),
        (
            (*VPP2, "parallel.last_stage_layers=1"),
            "gives stages of 1 and 3 layers, not all multiples of parallel.vpp_size=2",
        ),
        (
            ("objective=asft", "parallel.pp_size=3", "trainer.global_batch_size=6"),
            "or set parallel.last_stage_layers",
        ),
        (
            (*PP2, FULL, "recompute.num_layers=3"),
            "recompute.num_layers=3 is more than the 2 layers of a pipeline stage",
        ),
        (
            (*PP2, "recompute.num_layers=2"),
            "recompute.num_layers does nothing with recompute.granularity=none",
        ),
        ((*PP2, "recompute.granularity=all"), "set one of none, selective, full"),
    ],
)
def test_one_sentence(violations: Violations, overrides: tuple[str, ...], said: str) -> None:
    found = violations(*overrides)
    assert [sentence for sentence in found if said in sentence], found


@pytest.mark.parametrize(
    "overrides",
    [
        (*PP2, "parallel.last_stage_layers=1"),
        (*PP2, "parallel.first_stage_layers=3"),
        (*PP2, "parallel.account_for_embedding=true", "parallel.account_for_loss=true"),
        (*PP2, FULL, "recompute.num_layers=2"),
        (*PP2, FULL, "recompute.method=block"),
        (*PP2, "recompute.granularity=selective"),
    ],
)
def test_what_fits_is_accepted(violations: Violations, overrides: tuple[str, ...]) -> None:
    assert violations(*overrides) == ()
