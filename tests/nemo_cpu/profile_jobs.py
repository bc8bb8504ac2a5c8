"""What the ranks do for the tests of the profile. Every function is called on all ranks with JSON arguments."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import torch
from jobs import fit


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
