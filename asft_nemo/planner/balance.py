"""Why the last pipeline stage is the slowest, and what shares of the layers would be faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from asft_nemo.planner.plan import Plan, changed

#: A change is worth a sentence from here on.
WORTH = 0.01


@dataclass(frozen=True)
class Share:
    """Another way to share out the layers.

    Attributes:
        settings: the overrides that give it, as on the command line.
        plan: with it.
    """

    settings: str
    plan: Plan


def head_in_layers(plan: Plan) -> tuple[float, float]:
    """The last stage's head and loss, and the reference's product in it, in seconds of this run's transformer layers."""
    last = plan.step.stages[-1]
    layer = plan.step.stages[0].layer
    return last.head / layer, last.reference_head / layer


def best_share(plan: Plan) -> Share | None:
    """The fastest way that fits, found by trying all; None where there is nothing to share out."""
    tried = [Share(_words(settings), changed(plan, settings)) for settings in _shares(plan)]
    fitting = [share for share in tried if share.plan.fits] or tried
    return min(fitting, key=lambda share: share.plan.step.seconds, default=None)


def _words(settings: dict[str, Any]) -> str:
    given = {
        key: value for key, value in settings.items() if value not in (None, False)
    }  # what a default already says needs no words
    return " ".join(f"{key}={str(value).lower()}" for key, value in given.items())


def _shares(plan: Plan) -> Iterator[dict[str, Any]]:
    """Shares that Megatron takes at this pipeline; equal ones among them."""
    layout, layers = plan.run.parallel, plan.spec.num_layers
    stages, virtual = layout.pp_size, layout.vpp_size or 1
    if stages < 2:
        return
    plain: dict[str, Any] = {
        "parallel.first_stage_layers": None,
        "parallel.last_stage_layers": None,
        "parallel.account_for_embedding": False,
        "parallel.account_for_loss": False,
    }
    for embedding in (False, True):
        for loss in (False, True):
            if (layers + embedding + loss) % (
                stages * virtual
            ) == 0 and layers + embedding + loss > stages * virtual:
                yield plain | {"parallel.account_for_embedding": embedding, "parallel.account_for_loss": loss}
    for last in range(virtual, layers, virtual):
        rest = layers - last
        if rest % ((stages - 1) * virtual) == 0:
            yield plain | {"parallel.last_stage_layers": last}
        for first in range(virtual, rest, virtual) if stages > 2 else ():
            if first != last and (rest - first) % ((stages - 2) * virtual) == 0:
                yield plain | {"parallel.first_stage_layers": first, "parallel.last_stage_layers": last}


def explain(plan: Plan) -> list[str]:
    """Sentences about the last stage; none without pipeline stages."""
    if plan.run.parallel.pp_size < 2:
        return []
    head, reference = head_in_layers(plan)
    of_it = f", {reference:.1f} of them the reference's head product" if reference else ""
    words = [
        f"the last stage also has the head and the loss: {head:.1f} layers' worth of a micro batch{of_it}"
    ]
    best = best_share(plan)
    if best is None:
        return words
    gain = 1 - best.plan.step.seconds / plan.step.seconds
    virtual = plan.run.parallel.vpp_size
    if gain >= WORTH:
        words.append(f"{best.settings or 'equal shares'} would make a step {100 * gain:.1f} % shorter")
    elif virtual is not None:
        words.append(
            f"no other share of the layers that {virtual} virtual stages allow is faster by 1 % or more"
        )
    else:
        words.append("no other share of the layers is faster by 1 % or more")
    return words
