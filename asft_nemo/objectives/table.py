"""The table of objectives. To add one: a weight rule in `weights`, a row here, an oracle row in the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from torch import Tensor

from asft_nemo.objectives import weights
from asft_nemo.objectives.weights import WeightInputs

Direction: TypeAlias = Literal["forward", "reverse"]
Scope: TypeAlias = Literal["token", "sequence"]
Rule: TypeAlias = Callable[[WeightInputs, Mapping[str, float]], Tensor]


@dataclass(frozen=True)
class Option:
    """A number that one objective owns.

    Attributes:
        default: used where the option is not given.
        minimum: smallest allowed value, itself allowed.
        maximum: largest allowed value, itself allowed; None for no bound.
        whole: True for a whole number.
        meaning: one line for error messages and docs.
    """

    default: float
    minimum: float
    meaning: str
    maximum: float | None = None
    whole: bool = False


@dataclass(frozen=True)
class ObjectiveRow:
    """One objective: L_t = (w_t + c) CE_t + kl_weight * D_t, with w_t detached.

    Attributes:
        weight: the rule for w_t.
        reads: what must be known besides the policy's cross entropy (see `Objective.reads`).
        summary: formula and source in one line.
        direction: the KL direction used where none is asked for; None for a row without a divergence.
        scope: "sequence" where w_t of one token depends on other tokens.
        ce_share_option: the option that is c; None for c = 0.
        options: the options this row owns.
        value: replaces (w_t + c) CE_t as the reported value; its gradient must be the row's.
    """

    weight: Rule
    reads: frozenset[str]
    summary: str
    direction: Direction | None = None
    scope: Scope = "token"
    ce_share_option: str | None = None
    options: Mapping[str, Option] = field(default_factory=lambda: MappingProxyType({}))
    value: Rule | None = None


def _row_options(**options: Option) -> Mapping[str, Option]:
    return MappingProxyType(options)


OBJECTIVES: Mapping[str, ObjectiveRow] = MappingProxyType(
    {
        "sft": ObjectiveRow(
            weight=weights.one,
            reads=frozenset(),
            summary="CE_t: maximum likelihood",
        ),
        "dft": ObjectiveRow(
            weight=weights.label_probability,
            reads=frozenset({"label_logprob"}),
            summary="sg(p_t) CE_t (arXiv 2508.05629)",
        ),
        "sft_kl": ObjectiveRow(
            weight=weights.one,
            reads=frozenset({"ref_hidden"}),
            summary="CE_t + kl_weight KL_t: maximum likelihood with an anchor",
            direction="forward",
        ),
        "asft": ObjectiveRow(
            weight=weights.label_probability,
            reads=frozenset({"label_logprob", "ref_hidden"}),
            summary="sg(p_t) CE_t + kl_weight KL_t (arXiv 2509.23753, Eq. 6)",
            direction="forward",
        ),
        "asft_sft": ObjectiveRow(
            weight=weights.label_probability,
            reads=frozenset({"label_logprob"}),
            summary="sg(p_t) CE_t + alpha CE_t (arXiv 2509.23753, Eq. 7)",
            ce_share_option="alpha",
            options=_row_options(alpha=Option(0.1, 0.0, "share of plain cross entropy")),
        ),
        "iw_sft": ObjectiveRow(
            weight=weights.sequence_importance,
            reads=frozenset({"label_logprob", "ref_label_logprob"}),
            summary="clamp(exp(T mean_seq(log pi - log ref)), 0, 16) CE_t (arXiv 2507.12856)",
            scope="sequence",
            options=_row_options(temperature=Option(1.0, 0.0, "T, the factor of the mean log ratio")),
        ),
        "eaft": ObjectiveRow(
            weight=weights.entropy_ratio,
            reads=frozenset({"topk_entropy"}),
            summary="(H_top20 / ln 20)^a CE_t (arXiv 2601.02151)",
            options=_row_options(exponent=Option(1.0, 0.0, "a, the power of the entropy ratio")),
        ),
        "psft": ObjectiveRow(
            weight=weights.clipped_ratio,
            reads=frozenset({"label_logprob", "old_label_logprob"}),
            summary="-min(r, clip(r, 1 - clip_low, 1 + clip_high)), r = pi / pi_old (arXiv 2508.17784)",
            options=_row_options(
                clip_low=Option(0.2, 0.0, "lower clip of r; never acts on the gradient", maximum=1.0),
                clip_high=Option(0.28, 0.0, "upper clip of r; above it a token's gradient is 0"),
                refresh_every=Option(
                    4, 1, "steps between snapshots of the policy; at 1 the ratio is always 1", whole=True
                ),
            ),
            value=weights.clipped_surrogate,
        ),
    }
)


def objective_names() -> tuple[str, ...]:
    """The names `objective` accepts, in the table's order."""
    return tuple(OBJECTIVES)
