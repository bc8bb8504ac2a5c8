"""What a whole run comes to: hours, and the reference's cache on disk."""

from __future__ import annotations

from dataclasses import dataclass

from asft_nemo.planner.plan import Plan, reference_forms

TOKENS = 10**9  # what figures are given for where the length of a run is not known
_CHECKSUM = 4  # bytes: a CRC-32 beside every row (`asft_nemo.reference.cache_manifest`)


@dataclass(frozen=True)
class Totals:
    """Of a whole run, padding included, every token being learned.

    Attributes:
        steps: `trainer.max_steps`; None where only the data says how many there are.
        tokens: of all steps; `TOKENS` where their number is not known.
        hours: of these tokens.
        cache_bytes: of `reference=cached` on disk, where these tokens are all different (a second epoch adds nothing); None where no
            reference is read.
        read_bytes_per_second: bytes a second that all ranks of the last stage read of it together.
    """

    steps: int | None
    tokens: int
    hours: float
    cache_bytes: int | None
    read_bytes_per_second: float | None


def totals_of(plan: Plan) -> Totals:
    """Arithmetic from the plan of a step."""
    run, step = plan.run, plan.step
    steps = run.trainer.max_steps
    tokens = TOKENS if steps is None else steps * step.tokens
    cached = reference_forms(plan).get("cached")
    hours = tokens / step.tokens * step.seconds / 3600
    if cached is None:
        return Totals(steps, tokens, hours, None, None)
    row = plan.spec.hidden_size * plan.compute_bytes
    # Under sequence parallelism each tensor rank reads its own tokens, else each reads all.
    readers = 1 if run.parallel.sequence_parallel else run.parallel.tp_size
    return Totals(
        steps, tokens, hours, tokens * (row + _CHECKSUM), readers * row * step.tokens / cached.step.seconds
    )


def in_words(plan: Plan) -> list[str]:
    """Sentences, for a person."""
    totals = totals_of(plan)
    known = f"{totals.steps:,} steps" if totals.steps is not None else "10^9 tokens (padding included)"
    words = [f"{known}: {_time(totals.hours)}"]
    if totals.cache_bytes is not None and totals.read_bytes_per_second is not None:
        words.append(
            f"reference=cached, all of them different and learned: {_size(totals.cache_bytes)} on disk, read at "
            f"{totals.read_bytes_per_second / 1e9:.2f} GB/s by all ranks together"
        )
    return words


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if 60 * hours >= 1 else f"{3600 * hours:.1f} s"


def _size(count: int) -> str:
    return f"{count / 1e9:,.0f} GB" if count >= 1e10 else f"{count / 1e6:,.0f} MB"
