"""An objective as a value: a row of the table with its numbers filled in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from asft_nemo.errors import ObjectiveError
from asft_nemo.objectives.table import OBJECTIVES, Direction, ObjectiveRow, Option, Scope
from asft_nemo.objectives.weights import WeightInputs


@dataclass(frozen=True)
class Objective:
    """L_t = (w_t + c) CE_t + kl_weight * D_t per valid token. Built by `objective`, which checks the numbers.

    Immutable, hashable and picklable; equal objectives compare equal.

    Attributes:
        name: the row's name.
        kl_weight: factor of the divergence; 0 where the row has none.
        kl_direction: "forward" for KL(ref||policy), "reverse" for KL(policy||ref); None for a row without a
            divergence.
        option_items: (name, value) of every option of the row, in the row's order.
    """

    name: str
    kl_weight: float = 0.0
    kl_direction: Direction | None = None
    option_items: tuple[tuple[str, float], ...] = ()

    @property
    def row(self) -> ObjectiveRow:
        """The table's row: weight rule, what it reads, its options."""
        return OBJECTIVES[self.name]

    @property
    def options(self) -> dict[str, float]:
        """The row's options with their values; a fresh dict."""
        return dict(self.option_items)

    @property
    def reads(self) -> frozenset[str]:
        """What the loss must be given or must compute besides the policy's cross entropy.

        Any of `label_logprob`, `topk_entropy` (from the policy), `ref_hidden`, `ref_label_logprob` (from the
        reference), `old_label_logprob` (from the snapshot). `kl_weight = 0` drops `ref_hidden`.
        """
        return self.row.reads if self.kl_weight else self.row.reads - {"ref_hidden"}

    @property
    def scope(self) -> Scope:
        """ "token", or "sequence" where a token's weight depends on its sequence's other tokens."""
        return self.row.scope

    @property
    def divergence(self) -> Direction | None:
        """The direction of the KL term that is computed; None where there is none or `kl_weight` is 0."""
        return self.kl_direction if self.kl_weight else None

    @property
    def kl_metric(self) -> str | None:
        """Name of the divergence in metrics: `kl` (forward), `kl_reverse`, or None where none is computed."""
        return {"forward": "kl", "reverse": "kl_reverse", None: None}[self.divergence]

    @property
    def needs_reference(self) -> bool:
        """True where anything of the frozen reference is read."""
        return any(name.startswith("ref_") for name in self.reads)

    @property
    def needs_old_policy(self) -> bool:
        """True where a snapshot of the policy is read."""
        return any(name.startswith("old_") for name in self.reads)

    @property
    def ce_share(self) -> float:
        """c, the constant added to every token's weight."""
        return self.options[self.row.ce_share_option] if self.row.ce_share_option else 0.0

    def token_weight(self, inputs: WeightInputs) -> Tensor:
        """w_t of every valid token, detached. [N], dtype of the label log probabilities.

        Raises:
            ObjectiveError: something the objective reads is missing.
        """
        return self.row.weight(inputs, self.options).detach()

    def cross_entropy_value(self, inputs: WeightInputs) -> Tensor:
        """A token's reported value without its divergence: (w_t + c) CE_t, or the row's value rule. [N]."""
        if self.row.value is not None:
            return self.row.value(inputs, self.options)
        return (self.token_weight(inputs) + self.ce_share) * -inputs.label_logprob_N


def _number(name: str, value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ObjectiveError(f"{name}: {what} must be a finite number, got {value!r}: give a number")
    return float(value)


def _option_value(objective_name: str, name: str, option: Option, value: object) -> float:
    number = _number(objective_name, value, f"{name} ({option.meaning})")
    above = option.maximum is not None and number > option.maximum
    if number < option.minimum or above or (option.whole and number != int(number)):
        kind = "a whole number" if option.whole else "a number"
        upper = "" if option.maximum is None else f" and at most {option.maximum:g}"
        raise ObjectiveError(
            f"{objective_name}: {name}={value!r} does not fit: {name} ({option.meaning}) is {kind} of at "
            f"least {option.minimum:g}{upper}, set it so or leave it out for {option.default:g}"
        )
    return int(number) if option.whole else number


def _option_items(name: str, row: ObjectiveRow, given: dict[str, object]) -> tuple[tuple[str, float], ...]:
    for option in given:
        if option not in row.options:
            owners = [other for other, other_row in OBJECTIVES.items() if option in other_row.options]
            belongs = f"it belongs to {', '.join(owners)}" if owners else "no objective has it"
            own = f"its options are {', '.join(row.options)}" if row.options else "it has no options"
            raise ObjectiveError(f"objective {name} has no option {option!r} ({belongs}; {own}): remove it")
    return tuple(
        (key, _option_value(name, key, option, given.get(key, option.default)))
        for key, option in row.options.items()
    )


def _kl_term(
    name: str, row: ObjectiveRow, kl_weight: float | None, kl_direction: str | None
) -> tuple[float, Direction | None]:
    weight = None if kl_weight is None else _number(name, kl_weight, "kl_weight")
    if weight is not None and weight < 0:
        raise ObjectiveError(
            f"{name}: kl_weight={kl_weight!r} would push the policy away from the reference: "
            f"set it to 0 or more"
        )
    directions: tuple[Direction, ...] = get_args(Direction)
    if kl_direction is not None and kl_direction not in directions:
        raise ObjectiveError(
            f"{name}: unknown kl_direction {kl_direction!r}: choose forward, KL(ref||policy), "
            f"or reverse, KL(policy||ref)"
        )
    if row.direction is None:
        return 0.0, None
    if weight is None:
        raise ObjectiveError(
            f"objective {name} has a KL term and needs kl_weight: give it (the paper uses 0.05)"
        )
    chosen = row.direction if kl_direction is None else directions[directions.index(kl_direction)]
    return weight, chosen


def objective(
    name: str, *, kl_weight: float | None = None, kl_direction: str | None = None, **options: float | None
) -> Objective:
    """Build an objective from its row and the given numbers.

    Args:
        name: a row's name, see `objective_names`.
        kl_weight: factor of the KL term, >= 0; needed by rows that have one. Settings hold one kl_weight and
            one kl_direction for all objectives, so a row without a KL term checks them and then has neither.
        kl_direction: "forward" or "reverse"; None takes the row's.
        **options: the row's own options; one that is None counts as not given.

    Raises:
        ObjectiveError: an unknown name, an option of another objective, a number out of its range.

    Example:
        >>> objective("asft", kl_weight=0.05).needs_reference
        True
    """
    row = OBJECTIVES.get(name)
    if row is None:
        raise ObjectiveError(f"unknown objective {name!r}: choose one of {', '.join(OBJECTIVES)}")
    weight, direction = _kl_term(name, row, kl_weight, kl_direction)
    given: dict[str, object] = {key: value for key, value in options.items() if value is not None}
    return Objective(name, weight, direction, _option_items(name, row, given))
