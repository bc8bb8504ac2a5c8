"""What a result says of its model's drift, for tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping

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
