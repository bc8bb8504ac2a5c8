"""What the figures say, by rules that are fixed before the figures are known.

The paper's point, put to the test: ASFT learns the new skill about as well as SFT or better, forgets less of the old ones, and
drifts less from the base. It is five claims, each about one difference. A claim holds only when the difference's whole
95 % interval and every single seed are on its side of the claim's bound; it fails only when all of them are on the other side; else the
figures do not decide it. The point is shown when all five hold, contradicted when any fails, undecided otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from asft_nemo.demo.figures import (
    Estimate,
    Group,
    accuracy,
    drift,
    drift_difference,
    new_difference,
    old_accuracy,
    old_difference,
)

SIMILAR = 0.10
"""How far below SFT's ASFT's accuracy on the new skill may be and still count as similar: 10 points."""

Status = Literal["yes", "no", "undecided"]
Outcome = Literal["shown", "contradicted", "undecided"]

TITLES = {"base": "base", "sft": "SFT", "dft": "DFT", "sft_kl": "SFT + KL", "asft": "ASFT"}


@dataclass(frozen=True)
class Claim:
    """One claim and what became of it.

    Attributes:
        id: short name.
        text: the claim.
        bound: the claim is `difference > bound`.
        difference: the measured difference.
        unit: "points" (of 0 to 1) or "nats".
        status: by the rule.
    """

    id: str
    text: str
    bound: float
    difference: Estimate
    unit: Literal["points", "nats"]
    status: Status


@dataclass(frozen=True)
class Verdict:
    """The outcome, its claims, and the report's first sentences."""

    outcome: Outcome
    claims: tuple[Claim, ...]
    headline: str
    details: str


def status(difference: Estimate, bound: float) -> Status:
    """Whether `difference > bound` holds: interval and every seed must agree."""
    values = (difference.value, difference.low, difference.high, *difference.per_seed)
    if all(value > bound for value in values):
        return "yes"
    return "no" if all(value < bound for value in values) else "undecided"


def judge(groups: Mapping[str, Group]) -> Verdict:
    """The verdict on the groups `base`, `sft` and `asft`; other groups take no part in it."""
    base, sft, asft = groups["base"], groups["sft"], groups["asft"]
    claims = (
        _claim("learned", "ASFT learned the new skill", new_difference(asft, base), 0.0),
        _claim(
            "as_well",
            f"ASFT is at most {100 * SIMILAR:.0f} points behind SFT on the new skill",
            new_difference(asft, sft),
            -SIMILAR,
        ),
        _claim("sft_forgot", "SFT forgot some of the old skills", old_difference(base, sft), 0.0),
        _claim("kept_more", "ASFT kept more of the old skills than SFT", old_difference(asft, sft), 0.0),
        _claim(
            "drifted_less",
            "ASFT drifted less from the base than SFT",
            drift_difference(sft, asft),
            0.0,
            unit="nats",
        ),
    )
    found = {claim.status for claim in claims}
    outcome: Outcome = "contradicted" if "no" in found else "undecided" if "undecided" in found else "shown"
    return Verdict(outcome, claims, _headline(outcome, claims), _details(groups, claims))


def _claim(
    id_: str,
    text: str,
    difference: Estimate,
    bound: float,
    *,
    unit: Literal["points", "nats"] = "points",
) -> Claim:
    return Claim(id_, text, bound, difference, unit, status(difference, bound))


NEGATED = {
    "learned": "ASFT did not learn the new skill",
    "as_well": f"ASFT is more than {100 * SIMILAR:.0f} points behind SFT on the new skill",
    "sft_forgot": "SFT forgot nothing, so there was nothing to keep",
    "kept_more": "ASFT kept less of the old skills than SFT",
    "drifted_less": "ASFT drifted further from the base than SFT",
}


def _headline(outcome: Outcome, claims: tuple[Claim, ...]) -> str:
    if outcome == "shown":
        gain = next(claim.difference for claim in claims if claim.id == "as_well")
        learned = "better than" if status(gain, 0.0) == "yes" else "about as well as"
        return f"ASFT learned the new skill {learned} SFT, forgot less of the old ones, and stayed closer to the base."
    if outcome == "contradicted":
        failed = "; ".join(NEGATED[claim.id] for claim in claims if claim.status == "no")
        return f"These figures do not show the paper's point: {failed}."
    return "These figures do not decide whether the paper's point holds."


def _details(groups: Mapping[str, Group], claims: tuple[Claim, ...]) -> str:
    base, sft, asft = groups["base"], groups["sft"], groups["asft"]
    new = [percent(accuracy(group, group.new_skill).value) for group in (asft, sft, base)]
    old = [percent(old_accuracy(group).value) for group in (asft, sft, base)]
    kl = [f"{drift(group, 'forward_kl').value:.3f}" for group in (asft, sft)]
    undecided = "; ".join(claim.text for claim in claims if claim.status == "undecided")
    return (
        f"{'Left open: ' + undecided + '. ' if undecided else ''}"
        f"New skill: ASFT {new[0]}, SFT {new[1]}, base {new[2]}. Old skills: ASFT {old[0]}, SFT {old[1]}, base {old[2]}. "
        f"Drift, KL(ref||policy): ASFT {kl[0]}, SFT {kl[1]} nats per token."
    )


def percent(share: float) -> str:
    """A share as per cent with one decimal."""
    return f"{100 * share:.1f} %"
