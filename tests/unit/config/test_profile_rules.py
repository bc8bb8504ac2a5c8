"""Which steps may be profiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from asft_nemo.config.profile_rules import Window, check_window, parse_window
from asft_nemo.errors import ConfigError

Violations = Callable[..., tuple[str, ...]]


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("3-5", "is unknown: set steps:a-b"),
        ("steps:3", "is unknown: set steps:a-b"),
        ("steps:a-b", "is unknown: set steps:a-b"),
        ("steps:0-2", "names no steps: they count from 1"),
        ("steps:5-3", "names no steps"),
        ("steps:1-21", "more than 20 steps, whose traces no viewer opens: set steps:1-3"),
        ("steps:9-11", "asks for steps that this run of 10 steps does not have"),
    ],
)
def test_what_is_no_window_is_refused(violations: Violations, profile: str, said: str) -> None:
    (found,) = violations("objective=asft", "trainer.max_steps=10", f"trainer.profile={profile}")
    assert found.startswith(f"trainer.profile={profile}")
    assert said in found


@pytest.mark.parametrize("profile", ["steps:1-1", "steps:9-10", "steps:1-10"])
def test_steps_of_the_run_may_be_profiled(violations: Violations, profile: str) -> None:
    assert violations("objective=asft", "trainer.max_steps=10", f"trainer.profile={profile}") == ()


def test_a_run_of_epochs_is_asked_when_its_steps_are_known(violations: Violations) -> None:
    assert violations("objective=asft", "trainer.epochs=1", "trainer.profile=steps:9-11") == ()
    assert check_window("steps:9-11", 11) == parse_window("steps:9-11") == Window(9, 11)
    with pytest.raises(ConfigError, match="this run of 10 steps"):
        check_window("steps:9-11", 10)


def test_a_peak_of_nothing_is_refused(violations: Violations) -> None:
    assert "trainer.peak_tflops=0" in violations("objective=asft", "trainer.peak_tflops=0")[0]
