"""The profiler alone, on one rank without a model: what a disk that is full, or a trace that cannot be read, does to it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import run_config

from asft_nemo.config.profile_rules import Window
from asft_nemo.nemo import profiling
from asft_nemo.profiling import rooms

pytestmark = pytest.mark.nemo


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A group of one rank; steps without a model, on a machine without a GPU."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(profiling, "ranges", lambda trainer: contextlib.nullcontext())
    monkeypatch.setattr(profiling, "_place", lambda: "TP 0")
    monkeypatch.setattr(profiling, "describe", lambda run: {"device": "a CPU"})
    monkeypatch.setattr(profiling.backend, "active", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    yield
    rooms.watch(rooms.Watch.NOBODY)
    torch.distributed.destroy_process_group()


def profiler_of(folder: Path, window: Window) -> profiling.StepProfiler:
    settings = {
        "objective.name": "sft",
        "model.path": "unread",
        "run.dir": str(folder),
        "trainer.profile": f"steps:{window.first}-{window.last}",
    }
    return profiling.StepProfiler(run_config(settings), window)


def profiled(folder: Path) -> Path:
    """Three steps, of which the first two are profiled; what is in the profile's folder."""
    profiler = profiler_of(folder, Window(1, 2))
    for step in (1, 2, 3):
        profiler.begin(None, step)
        with rooms.span("asft/forward"):
            torch.ones(8, 8).matmul(torch.ones(8, 8))
        profiler.end({})
    return folder / "profile"


WHOLE = {"rank_0.json", "rank_0.md", "rank_0.trace.json.gz", "summary.md"}


@pytest.mark.usefixtures("alone")
def test_a_whole_profile(tmp_path: Path) -> None:
    folder = profiled(tmp_path)
    assert {file.name for file in folder.iterdir()} == WHOLE
    assert json.loads((folder / "rank_0.json").read_text())["steps"] == [1, 2]


def full_disk(self: Any, path: str) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def cut_short(self: Any, path: str) -> None:
    Path(path).write_text('{"traceEvents": [{"ph": "X", "na')


def without_the_step(self: Any, path: str) -> None:
    Path(path).write_text('{"traceEvents": []}')


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("export", "why"),
    [
        (full_disk, "No space left on device"),
        (cut_short, "Unterminated string"),
        (without_the_step, "no range asft/step"),
    ],
)
@pytest.mark.parametrize("spoilt", [1, 2])
def test_a_spoilt_trace_ends_the_profile_and_not_the_run(
    export: Any, why: str, spoilt: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any step of the window; the rank still comes to the summary, where others wait for it."""
    whole, exports = torch.profiler.profile.export_chrome_trace, []

    def once(self: Any, path: str) -> None:
        exports.append(path)
        (export if len(exports) == spoilt else whole)(self, path)

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", once)
    folder = profiled(tmp_path)
    assert [file.name for file in folder.iterdir()] == ["summary.md"]
    (told,) = [
        line for line in (folder / "summary.md").read_text().splitlines() if line.startswith("* rank 0")
    ]
    assert told.startswith(f"* rank 0 wrote none: the trace of step {spoilt}: ")
    assert why in told


@pytest.mark.usefixtures("alone")
def test_a_folder_that_cannot_be_made_ends_the_profile_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("a file in its place")
    with caplog.at_level(logging.WARNING):
        profiled(tmp_path)
    assert "rank 0 could not write its profile" in caplog.text
    assert "summary could not be written" in caplog.text


@pytest.mark.parametrize(("done", "warned"), [(0, False), (4, False), (5, True), (9, True)])
def test_a_run_that_goes_on_behind_its_window_says_so(
    done: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profiler = profiler_of(tmp_path, Window(3, 5))
    with caplog.at_level(logging.WARNING):
        profiler.say_if_past(done)
    said = f"trainer.profile=steps:3-5 profiles nothing: the run goes on after step {done}; name later steps, of {done + 1} or more"
    assert [record.getMessage() for record in caplog.records] == ([said] if warned else [])
