"""What settings are refused with."""

from __future__ import annotations

from collections.abc import Callable

from asft_nemo.errors import ConfigError


def sentences(check: Callable[[], object]) -> tuple[str, ...]:
    """The violations that a call ends with; none where it ends well."""
    try:
        check()
    except ConfigError as error:
        return error.violations
    return ()
