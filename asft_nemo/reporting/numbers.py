"""Numbers as the pages write them."""

from __future__ import annotations

MINUS = "−"


def points(value: float, *, sign: bool = True) -> str:
    """A difference of shares in percentage points."""
    return signed(100 * value, 1) if sign else f"{100 * value:.1f}"


def signed(value: float, digits: int) -> str:
    """With its sign, unless all digits shown are zero."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return (MINUS if value < 0 else "+") + text


def nats(value: float) -> str:
    """A KL in nats: three decimals, or one digit where that would be zero."""
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else f"{value:.1g}"


def share(value: float) -> str:
    """A share in per cent, without the sign of it."""
    return f"{100 * value:.1f}"
