"""What a result says of its model's drift, for tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asft_eval.resampling import Interval
from asft_eval.result import Result


def forward_kls(results: Mapping[str, Result]) -> dict[str, Interval]:
    """Model -> KL(ref||policy), of those that have it; the base itself, measured or not, has 0."""
    bases = {
        result.drift["base"]["fingerprint"]
        for result in results.values()
        if result.drift is not None and result.drift["base"] is not None
    }
    found: dict[str, Interval] = {}
    for name, result in results.items():
        if result.drift is not None and result.drift["forward_kl"] is not None:
            found[name] = Interval(**result.drift["forward_kl"])
        elif result.model["fingerprint"] in bases:
            found[name] = Interval(0.0, 0.0, 0.0)
    return found


def drift_table(results: Mapping[str, Result]) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows: a row a model with its drift and what it makes of the text; None where no model has any."""
    rows = [[name, *_row(result.drift)] for name, result in results.items() if result.drift is not None]
    if not rows:
        return None
    return ["model", "KL(ref||policy)", "KL(policy||ref)", "nll", "entropy", "perplexity", "ECE"], rows


def _row(drift: Mapping[str, Any]) -> list[str]:
    own = drift["model"]
    intervals = [drift["forward_kl"], drift["reverse_kl"], own["nll"], own["entropy"]]
    return [*map(_cell, intervals), f"{own['perplexity']:.2f}", f"{own['calibration']['ece']:.3f}"]


def _cell(interval: Mapping[str, float] | None) -> str:
    return "–" if interval is None else "{value:.4g} [{low:.4g}, {high:.4g}]".format(**interval)
