"""What a run shows of its steps: the reference's operations apart, speed under its own name, a log that can be read."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from asft_nemo.nemo import progress

pytestmark = pytest.mark.nemo


def line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "seconds": 2.0, "loss": 1.5, "nll": 1.25, "kl": 0.5, "kl_reverse": None,
        "tokens_per_second": 51200.0, "tflops_per_gpu": 405.0, "reference_tflops_per_gpu": 79.1, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "peak", "said"),
    [
        ({}, 989.0, ("mfu", "0.41 (reference 0.08)")),
        ({}, None, ("TFLOP/s", "405 (reference 79.1)")),
        ({"reference_tflops_per_gpu": 0.0}, 989.0, ("mfu", "0.41")),
        ({"tflops_per_gpu": 0.0}, 989.0, ("mfu", "0 (reference 0.08)")),
    ],
)
def test_speed_has_its_own_name(more: dict[str, Any], peak: float | None, said: tuple[str, str]) -> None:
    assert progress.speed_in_short(line(1, **more), peak) == said


@pytest.mark.parametrize(
    ("steps", "until", "seconds_a_step", "shown"),
    [
        (100, 100, 1.0, [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        (3, 3, 1.0, [1, 2, 3]),
        (20, 20, 45.0, list(range(2, 21, 2))),
        (1000, 10, 25.0, [3, 6, 9]),
    ],
)
def test_a_log_has_a_line_a_tenth_and_a_minute(
    steps: int,
    until: int,
    seconds_a_step: float,
    shown: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("ASFT_PROGRESS", raising=False)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    caplog.set_level(logging.ERROR, logger="asft_nemo")  # as on ranks other than the first
    caplog.handler.setLevel(logging.NOTSET)
    one = progress.Progress("asft", done=0, steps=steps)
    for step in range(1, until + 1):
        now += seconds_a_step
        one.show(line(step), 989.0)
    one.close()
    said = [record.getMessage() for record in caplog.records if record.name == progress.logger.name]
    assert [text.split("/")[0] for text in said] == [f"asft: step {step}" for step in shown]
    assert said[0].endswith(
        "loss 1.5 nll 1.25 kl 0.5 tokens/s 51,200 mfu 0.41 (reference 0.08), about "
        f"{progress.duration(2 * (steps - shown[0]))} left"
    )


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"), (90061, "1 d 1 h")],
)
def test_time_left_has_two_units(seconds: float, said: str) -> None:
    assert progress.duration(seconds) == said


def test_a_step_with_a_validation_does_not_change_the_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    one = progress.Progress("asft", done=0, steps=10)
    for step in (1, 2, 3):
        one.show(line(step, seconds=100.0 if step == 3 else 1.0), None)
    one.close()
    assert caplog.records[-1].getMessage().endswith("about 7 s left")
