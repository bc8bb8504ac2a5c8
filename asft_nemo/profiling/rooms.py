"""Ranges named after the rooms of the house, for torch's profiler and for NVIDIA's (NVTX).

A range costs one look at a switch while nobody is watching (0.6 microseconds on a busy CPU; 16 while watched), so `room` may stand in
code that runs for every micro batch. `watch` turns the switch.
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

PREFIX = "asft/"
ROOMS = ("reference", "forward", "loss", "backward", "optimizer", "data")
# within the room "reference", whose passes also exchange messages with other stages: a frozen model computes a micro batch
FROZEN_MODEL = "frozen_model"

# Megatron's timers that are rooms of ours; all others get a range under Megatron's own name
_OF_MEGATRON = {"backward-compute": PREFIX + "backward"}
_NOTHING = contextlib.nullcontext()


class Watch(enum.Enum):
    """Who is watching: nobody, torch's profiler, or NVIDIA's, too (which needs a GPU)."""

    NOBODY = enum.auto()
    PROFILER = enum.auto()
    NVTX = enum.auto()


class _Switch:
    state = Watch.NOBODY


def room(name: str) -> AbstractContextManager[Any]:
    """A range of this name while somebody is watching, else nothing.

    Args:
        name: one of `ROOMS`, or `FROZEN_MODEL`.
    """
    return _NOTHING if _Switch.state is Watch.NOBODY else span(PREFIX + name)


def watch(by: Watch) -> Watch:
    """Turns ranges on or off; returns who was watching before."""
    before, _Switch.state = _Switch.state, by
    return before


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """A range of this very name, whoever is watching."""
    nvtx = _Switch.state is Watch.NVTX
    if nvtx:
        torch.cuda.nvtx.range_push(name)
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if nvtx:
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
