"""Which of many like cases `make test` runs; the others wait for `make test-long`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some_of(cases: Iterable[Any], kept: Collection[str]) -> list[Any]:
    """The cases as `pytest.mark.parametrize` takes them; those that are not kept are marked `long`.

    Args:
        cases: strings, or tuples for several parameters. Their words, with dashes between, are the ids.
        kept: ids.

    Raises:
        ValueError: `kept` names no case.
    """
    named = {
        "-".join(map(str, values)): values
        for values in (case if isinstance(case, tuple) else (case,) for case in cases)
    }
    if missing := set(kept) - set(named):
        raise ValueError(f"no case is called {sorted(missing)}")
    return [
        pytest.param(*values, id=name, marks=() if name in kept else pytest.mark.long)
        for name, values in named.items()
    ]
