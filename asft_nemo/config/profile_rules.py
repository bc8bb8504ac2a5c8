"""Rules about the profile of a few steps, rows of the table of `asft_nemo.config.rules`, and how its setting is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from asft_nemo.config.facts import Facts, Rule
from asft_nemo.errors import ConfigError

MOST_STEPS = 20  # a trace of one step has 10^4 to 10^6 events, all of which are read back
_FORM = re.compile(r"steps:(\d+)-(\d+)")


class Window(NamedTuple):
    """The steps that are profiled, numbered from 1 as in metrics.jsonl, both inclusive."""

    first: int
    last: int


def parse_window(text: str) -> Window | None:
    """The steps that `trainer.profile` names, None where it has another form than ``steps:a-b``."""
    found = _FORM.fullmatch(text)
    return Window(int(found[1]), int(found[2])) if found else None


def beyond_the_end(window: Window, max_steps: int) -> str | None:
    """The sentence for a window that the run ends before, None for one that fits."""
    if window.last <= max_steps:
        return None
    return (
        f"trainer.profile=steps:{window.first}-{window.last} asks for steps that this run of {max_steps} steps does not have: name "
        "earlier ones, or train longer"
    )


def check_window(text: str, max_steps: int) -> Window:
    """The window, once the number of steps is known.

    Raises:
        ConfigError: the run ends before it.
    """
    window = parse_window(text)
    assert window is not None  # the rule below was asked first
    problem = beyond_the_end(window, max_steps)
    if problem is not None:
        raise ConfigError(problem)
    return window


def _window(facts: Facts) -> Iterator[str]:
    trainer = facts.run.trainer
    if trainer.profile is None:
        return
    window = parse_window(trainer.profile)
    if window is None:
        yield f"trainer.profile={trainer.profile} is unknown: set steps:a-b with the first and the last step to profile, for example steps:3-5"
    elif not 1 <= window.first <= window.last:
        yield (
            f"trainer.profile={trainer.profile} names no steps: they count from 1, and the first comes first, as in steps:3-5"
        )
    elif window.last - window.first >= MOST_STEPS:
        yield (
            f"trainer.profile={trainer.profile} names more than {MOST_STEPS} steps, whose traces no viewer opens: set "
            f"steps:{window.first}-{window.first + 2}, which is enough for means"
        )
    elif trainer.max_steps is not None and (problem := beyond_the_end(window, trainer.max_steps)):
        yield problem


PROFILE: tuple[Rule, ...] = (_window,)
