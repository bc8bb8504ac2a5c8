"""What ranks of this machine find in their environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from asft_nemo.launch_local import _environment


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"),
    [
        (2, 1, 1),
        (2, 4, 1),
        (8, 1, 2),
        (8, 4, 2),
        (8, 8, 1),
        (64, 2, 16),
        (64, 8, 8),
        (64, 16, 4),
        (None, 4, 1),
    ],
)
def test_ranks_together_have_no_more_threads_than_there_are_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, ranks: int, threads: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert _environment(Path("error.json"), ranks)["OMP_NUM_THREADS"] == str(threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _environment(Path("error.json"), ranks)["OMP_NUM_THREADS"] == "3"
