"""Ranges: there when somebody is watching, and next to nothing when nobody is."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from asft_nemo.profiling import rooms


@pytest.fixture(autouse=True)
def unwatched() -> Iterator[None]:
    yield
    rooms.watch(rooms.Watch.NOBODY)


def recorded() -> tuple[torch.profiler.profile, set[str]]:
    timers = rooms.Spans()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with rooms.room("forward"):
            timers("backward-compute", log_level=2).start()
            timers("forward-recv", log_level=2).start(barrier=True)
            torch.ones(1).add(1)
            timers("forward-recv").stop()
            timers("backward-compute").stop()
    return profiler, {one.key for one in profiler.key_averages()}


def test_ranges_carry_the_names_of_the_rooms() -> None:
    rooms.watch(rooms.Watch.PROFILER)
    assert {"asft/forward", "asft/backward", "megatron/forward-recv"} <= recorded()[1]


def test_nobody_watches() -> None:
    assert "asft/forward" not in recorded()[1]


def test_an_unwatched_range_costs_nothing_to_speak_of() -> None:
    """Processor time, and the least of several measurements: a machine under load is slower, never faster."""

    def seconds() -> float:
        started = time.thread_time()
        for _ in range(10_000):
            with rooms.room("forward"):
                pass
        return (time.thread_time() - started) / 10_000

    assert min(seconds() for _ in range(20)) < 3e-6


def test_nvidias_profilers_see_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for NVTX, which this torch may lack: pushes and pops are paired, also where the code within fails."""
    stack: list[str] = []
    pushed: list[str] = []

    def push(name: str) -> None:
        stack.append(name)
        pushed.append(name)

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: stack.pop())
    assert rooms.watch(rooms.Watch.NVTX) is rooms.Watch.NOBODY
    with pytest.raises(ValueError, match="within"), rooms.room("loss"):
        raise ValueError("within")
    assert pushed == ["asft/loss"]
    assert stack == []
