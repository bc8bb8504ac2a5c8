"""What the ranks do for the tests of the profile. Every function is called on all ranks with JSON arguments."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jobs import fit


def train_with_clocked_ranges(settings: dict[str, Any], *, valid: list[int]) -> None:
    """Trains; `run.dir`/ranges_<rank>.json says for how many seconds each profiled step's range was open, by a clock around it."""
    from asft_nemo.profiling import rooms
    from asft_nemo.profiling.trace import STEP

    found: list[float] = []
    span = rooms.span

    @contextmanager
    def clocked(name: str) -> Iterator[None]:
        started = time.perf_counter()
        with span(name):
            yield
        if name == STEP:
            found.append(time.perf_counter() - started)

    rooms.span = clocked
    try:
        fit(settings, valid=valid)
    finally:
        rooms.span = span
    file = Path(settings["run.dir"]) / f"ranges_{os.environ['RANK']}.json"
    file.write_text(json.dumps(found))


def train_with_spoilt_traces(settings: dict[str, Any], *, valid: list[int]) -> None:
    """Trains; rank 1 cannot write its traces, rank 2's are cut short, as torch leaves them on a full disk, rank 3's have no step."""
    whole = torch.profiler.profile.export_chrome_trace

    def export(self: Any, path: str) -> None:
        rank = torch.distributed.get_rank()
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, path)
        text = Path(path).read_text()
        if rank == 2:
            Path(path).write_text(text[: len(text) // 2])
        if rank == 3:
            Path(path).write_text(text.replace("asft/step", "asft/other"))

    torch.profiler.profile.export_chrome_trace = export  # type: ignore[method-assign]
    try:
        fit(settings, valid=valid)
    finally:
        torch.profiler.profile.export_chrome_trace = whole  # type: ignore[method-assign]


def warnings_of_profile(settings: dict[str, Any], *, valid: list[int]) -> list[str]:
    """Trains; what the profile warned of on this rank."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    listened = logging.getLogger("asft_nemo.nemo.profiling")
    listened.addHandler(handler)
    try:
        fit(settings, valid=valid)
    finally:
        listened.removeHandler(handler)
    return said
