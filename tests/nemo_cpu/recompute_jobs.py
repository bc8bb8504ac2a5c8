"""What the ranks do for the tests of recomputed activations."""

from __future__ import annotations

from typing import Any


def train_and_count(settings: dict[str, Any], *, valid: list[int]) -> int:
    """A run; returns how often Megatron kept an input alone in order to compute its activations again."""
    from jobs import fit
    from megatron.core import tensor_parallel

    kept = 0
    original = tensor_parallel.checkpoint

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal kept
        kept += 1
        return original(*arguments, **named)

    tensor_parallel.checkpoint = counted  # type: ignore[assignment]
    try:
        fit(settings, valid=valid)
    finally:
        tensor_parallel.checkpoint = original  # type: ignore[assignment]
    return kept
