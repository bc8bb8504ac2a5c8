"""The verdict follows the figures, also where they do not please."""

from __future__ import annotations

import pytest
from unit.demo.made_up import group, groups

from asft_nemo.demo.figures import Estimate
from asft_nemo.demo.verdict import judge, status


@pytest.mark.parametrize(
    ("estimate", "bound", "expected"),
    [
        (Estimate(0.2, 0.1, 0.3, (0.1, 0.3)), 0.0, "yes"),
        (Estimate(0.2, 0.1, 0.3, (0.1, 0.3)), 0.1, "undecided"),
        (Estimate(0.2, 0.1, 0.3, (-0.1, 0.5)), 0.0, "undecided"),
        (Estimate(0.2, -0.1, 0.3, (0.1, 0.3)), 0.0, "undecided"),
        (Estimate(-0.2, -0.3, -0.1, (-0.2,)), 0.0, "no"),
        (Estimate(-0.2, -0.3, -0.1, (-0.3, 0.1)), 0.0, "undecided"),
        (Estimate(-0.2, -0.3, -0.1, (-0.2,)), -0.4, "yes"),
        (Estimate(0.0, 0.0, 0.0, (0.0,)), 0.0, "undecided"),
    ],
)
def test_a_claim_needs_its_interval_and_every_seed(estimate: Estimate, bound: float, expected: str):
    assert status(estimate, bound) == expected


def test_the_papers_picture():
    verdict = judge(groups())
    assert verdict.outcome == "shown"
    assert [claim.status for claim in verdict.claims] == ["yes"] * 5
    assert verdict.headline.startswith("ASFT learned the new skill ")
    assert "forgot less" in verdict.headline
    for number in ("90.0 %", "85.0 %", "50.0 %", "70.0 %", "98.0 %"):
        assert number in verdict.details


@pytest.mark.parametrize(
    ("changes", "failed", "words"),
    [
        ({"asft": {"new": 0.3}}, {"learned", "as_well"}, "did not learn"),
        ({"asft": {"new": 0.6}}, {"as_well"}, "more than 10 points behind"),
        ({"asft": {"old": 0.5}}, {"kept_more"}, "kept less"),
        ({"asft": {"kl": 0.4}}, {"drifted_less"}, "drifted further"),
        ({"base": {"old": 0.5}, "sft": {"old": 0.7}}, {"sft_forgot"}, "forgot nothing"),
    ],
)
def test_what_contradicts_the_paper_is_said(changes: dict, failed: set[str], words: str):
    verdict = judge(groups(**changes))
    assert verdict.outcome == "contradicted"
    assert {claim.id for claim in verdict.claims if claim.status == "no"} == failed
    assert verdict.headline.startswith("These figures do not show the paper's point: ")
    assert words in verdict.headline


def test_what_is_not_decided_is_said():
    verdict = judge(groups(asft={"old": 0.705}))
    assert verdict.outcome == "undecided"
    assert "do not decide" in verdict.headline
    assert verdict.details.startswith("Left open: ASFT kept more of the old skills than SFT.")


def test_one_seed_against_the_others_leaves_it_open():
    """The mean shows it, one seed does not: not shown."""
    found = groups()
    odd = group("asft", new=0.9, old=0.65, kl=0.05).models[0]
    strong = found["asft"].models
    asft = type(found["asft"])("asft", (*strong, *strong, odd), "swap", ("copy", "add"))
    sft = found["sft"]
    sft = type(sft)("sft", (*sft.models, *sft.models, sft.models[0]), "swap", ("copy", "add"))
    verdict = judge({**found, "asft": asft, "sft": sft})
    kept = next(claim for claim in verdict.claims if claim.id == "kept_more")
    assert kept.difference.low > 0
    assert kept.status == "undecided"


def test_better_is_said_only_when_it_is_clear():
    assert "better than SFT" in judge(groups(asft={"new": 0.99})).headline
    assert "about as well as SFT" in judge(groups(asft={"new": 0.86})).headline
