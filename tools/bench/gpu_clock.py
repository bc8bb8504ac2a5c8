"""Seconds of work on a device: by CUDA's events, or by the clock where work is done when its call returns."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Stopwatch:
    """Laps of a device's work, told after the last of them, so that measuring waits for nothing.

    Args:
        device: "cuda" or "cpu".
    """

    def __init__(self, device: str):
        self._events = device == "cuda"
        self._laps: list[tuple[Any, Any]] = []
        self._began: Any = None

    def _now(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Before the work."""
        self._began = self._now()

    def stop(self) -> None:
        """After it."""
        self._laps.append((self._began, self._now()))

    def seconds(self) -> list[float]:
        """Of every lap; waits for the device."""
        if not self._events:
            return [end - begin for begin, end in self._laps]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in self._laps]


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """One call's."""
    watch = Stopwatch(device)
    watch.start()
    work()
    watch.stop()
    return watch.seconds()[0]


def tidy(device: str) -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def peak_above(device: str) -> Iterator[dict[str, int]]:
    """Fills in `bytes`: the most that torch's allocator held above what it holds at entry. Nothing on a CPU, which has no such count."""
    found: dict[str, int] = {}
    if device != "cuda":
        yield found
        return
    tidy(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield found
    torch.cuda.synchronize()
    found["bytes"] = torch.cuda.max_memory_allocated() - before
