"""Ranges named after the rooms of the house, for torch's profiler and for NVIDIA's (NVTX).

A range costs one look at a switch while nobody is watching (0.6 microseconds on a busy CPU; 16 while watched), so `room` may stand in
code that runs for every micro batch. `watch` turns the switch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

PREFIX = "asft/"
ROOMS = ("reference", "forward", "loss", "backward", "optimizer", "data")

# Megatron's timers that are rooms of ours; all others get a range under Megatron's own name
_OF_MEGATRON = {"backward-compute": PREFIX + "backward"}
_NOTHING = contextlib.nullcontext()


class _Switch:
    watched = False
    nvtx = False


def room(name: str) -> AbstractContextManager[Any]:
    """A range of this name while somebody is watching, else nothing.

    Args:
        name: one of `ROOMS`.
    """
    return span(PREFIX + name) if _Switch.watched else _NOTHING


def watch(on: bool, *, nvtx: bool) -> None:
    """Turns ranges on or off.

    Args:
        on: whether ranges are made.
        nvtx: for NVIDIA's profilers, too; needs a GPU.
    """
    _Switch.watched, _Switch.nvtx = on, nvtx


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """A range of this very name, whoever is watching."""
    if _Switch.nvtx:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if _Switch.nvtx:
            torch.cuda.nvtx.range_pop()


def under_nsys() -> bool:
    """Whether Nsight Systems started this process: it leaves its session's number in the environment."""
    return "NSYS_PROFILING_SESSION_ID" in os.environ


class Spans:
    """What Megatron takes for its timers (`config.timers`): its schedules then open our ranges, and nothing of Megatron is changed.

    Megatron 0.15.3 calls ``timers(name, log_level=...)`` and ``.start(barrier=...)``, ``.stop()`` on the answer. `barrier` is not heeded: a
    range must not make ranks wait for one another.
    """

    def __init__(self) -> None:
        self._open: dict[str, list[AbstractContextManager[None]]] = {}

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        return _Timer(self._open.setdefault(name, []), _OF_MEGATRON.get(name, f"megatron/{name}"))


class _Timer:
    def __init__(self, opened: list[AbstractContextManager[None]], label: str):
        self._opened, self._label = opened, label

    def start(self, barrier: bool = False) -> None:
        """Opens a range."""
        one = span(self._label)
        one.__enter__()
        self._opened.append(one)

    def stop(self, barrier: bool = False) -> None:
        """Closes the last range of this name."""
        self._opened.pop().__exit__(None, None, None)
