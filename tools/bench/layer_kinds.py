"""Transformer Engine's layers beside Megatron's own in bf16: the same model, data and steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.compared import largest
from bench.training import Form

LOCAL_FORMS = {
    "sft_local": Form("sft, kernels.layers=local", ("objective=sft", "kernels.layers=local"), "sft"),
    "resident_local": Form(
        "asft, resident, kernels.layers=local",
        ("objective=asft", "reference=resident", "kernels.layers=local"),
        "resident",
    ),
}
# bf16 has 8 bits, so that one rounding moves a number by up to 2^-9 of it. A loss is a mean over thousands of tokens whose roundings are
# apart, a gradient's norm one over all parameters. Both bounds are of every step: weights drift apart by what gradients do.
LOSS_OF_LOCAL = 2**-8
NORM_OF_LOCAL = 2**-5


def differences(form: str, runs: Mapping[str, Mapping[str, Any]]) -> tuple[float, float] | None:
    """The largest relative differences of losses and of gradient norms over all steps; None where one of the two runs is not there."""
    own, other = runs.get(form, {}), runs.get(LOCAL_FORMS[form].against, {})
    if "losses" not in own or "losses" not in other:
        return None
    return largest(own["losses"], other["losses"]), largest(own["grad_norms"], other["grad_norms"])


def is_off(form: str, runs: Mapping[str, Mapping[str, Any]]) -> bool | None:
    """Whether they are further apart than bf16 is, or by no number; None where there is nothing to compare."""
    found = differences(form, runs)
    return None if found is None else not (found[0] <= LOSS_OF_LOCAL and found[1] <= NORM_OF_LOCAL)


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| form | losses apart by | gradient norms apart by | verdict |", "| --- " * 4 + "|"]
    for form in (form for form in LOCAL_FORMS if form in runs):
        found = differences(form, runs)
        if found is None:
            reason = runs[form].get("skipped") or runs[form].get("failed") or "nothing to compare with"
            cells = ["", "", str(reason).splitlines()[0].replace("|", "/")]
        else:
            cells = [f"{found[0]:.1e}", f"{found[1]:.1e}", "**off**" if is_off(form, runs) else "right"]
        lines.append(f"| {' | '.join([LOCAL_FORMS[form].title, *cells])} |")
    return "\n".join(lines)
