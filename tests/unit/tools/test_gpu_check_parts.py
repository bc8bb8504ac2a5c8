"""The GPU check's bookkeeping: needs, time, what breaks, what the bars say of it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path.insert(0, str(TOOLS))

from bench import gpu_page, gpu_parts, gpu_table  # noqa: E402
from bench.gpu_parts import UNMEASURED, Bar, Check, Part, SkipPart, run_part, run_parts, verdicts  # noqa: E402
from bench.gpu_rank import sentence  # noqa: E402
from bench.gpu_ranks import RankFailed  # noqa: E402


def check_of(folder: Path, *, device: str = "cuda", **given: Any) -> Check:
    return Check(argparse.Namespace(), device, folder, **given)


def part_of(name: str, work: Any, *, needs: Any = (), seconds: float = 1.0, bars: Any = ()) -> Part:
    return Part(name, name, needs, seconds, work, lambda found: str(found), bars)


def test_a_part_says_what_it_found_or_why_not(tmp_path: Path) -> None:
    def broken(check: Check) -> dict[str, Any]:
        raise ValueError("the first line\nmore")

    def full(check: Check) -> dict[str, Any]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total")

    def hung(check: Check) -> dict[str, Any]:
        raise RankFailed("x:y was not done in 3 s: rank 1 at its start", "a log")

    def left_out(check: Check) -> dict[str, Any]:
        raise SkipPart("why")

    def lost(check: Check) -> str | None:
        raise RuntimeError("CUDA error: unknown error\nmore")

    parts = [
        part_of("broken", broken),
        part_of("lacking", broken, needs=(lambda check: None, lambda check: "it has no X")),
        part_of("lost", broken, needs=(lost,)),
        part_of("full", full),
        part_of("hung", hung),
        part_of("left_out", left_out),
        part_of("good", lambda check: {"number": 1}),
    ]
    found = {part.name: result for part, result in run_parts(parts, check_of(tmp_path))}
    assert {name: (one["status"], one.get("reason")) for name, one in found.items()} == {
        "broken": ("failed", "ValueError: the first line"),
        "lacking": ("skipped", "it has no X"),
        "lost": ("failed", "RuntimeError: CUDA error: unknown error"),
        "full": (
            "failed",
            "the GPU's memory does not hold it (CUDA out of memory. Tried to allocate 2.00 GiB)",
        ),
        "hung": ("failed", "x:y was not done in 3 s: rank 1 at its start"),
        "left_out": ("skipped", "why"),
        "good": ("done", None),
    }
    assert found["good"]["found"] == {"number": 1}


class Clock:
    """In place of `time` in the check: it moves when it is told to, however busy this machine is."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[Check], dict[str, Any]]:
        """A part's, which takes so long."""

        def take(check: Check) -> dict[str, Any]:
            self.now += seconds
            return {}

        return take


def test_what_does_not_fit_the_time_is_left_out_and_what_still_does_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(gpu_parts, "time", clock)
    check = check_of(tmp_path, minutes=0.05, began=clock.now)  # 3 s
    parts = [part_of(name, clock.work(0.0), seconds=s) for name, s in (("a", 1), ("b", 100), ("c", 1))]
    found = {part.name: result for part, result in run_parts(parts, check)}
    assert [found[name]["status"] for name in "abc"] == ["done", "done", "done"], "a took no time: nor will b"
    slow = [
        part_of("a", clock.work(0.4), seconds=0.1),
        part_of("b", clock.work(2.0), seconds=2.0),  # four times as long as expected, too: 8 s
        part_of("c", clock.work(0.1), seconds=0.1),
    ]
    check = check_of(tmp_path, minutes=0.05, began=clock.now)
    found = {part.name: result for part, result in run_parts(slow, check)}
    assert [found[name]["status"] for name in "abc"] == ["done", "skipped", "done"]
    assert found["b"]["reason"].startswith("it would take about 0.1 minutes, and --minutes leaves 0.0")
    assert check_of(tmp_path).left() == math.inf


def test_what_the_end_of_the_time_cuts_off_has_not_failed(tmp_path: Path) -> None:
    def cut(check: Check) -> dict[str, Any]:
        check.minutes = 0.0
        raise RankFailed("x:y was not done in 5 s: rank 0 at its start")

    result = run_part(part_of("p", cut), check_of(tmp_path, minutes=1.0))
    assert (result["status"], result["reason"]) == (
        "skipped",
        "--minutes was up: x:y was not done in 5 s: rank 0 at its start",
    )


BARS = (
    Bar("low", "a ratio", "2"),
    Bar("high", "another", "2"),
    Bar("nan", "a third", "2"),
    Bar("reason", "a fourth", "2"),
    Bar("absent", "a fifth", "2"),
)


def test_bars_are_passed_missed_or_unmeasured_with_a_reason() -> None:
    told = {
        "low": {"measured": 2.0, "limit": 2.0},
        "high": {"measured": 2.0001, "limit": 2.0},
        "nan": {"measured": float("nan"), "limit": 2.0},
        "reason": {"reason": "no | Liger"},
    }
    parts = [
        part_of("p", None, bars=BARS),
        part_of("q", None, bars=(BARS[0],)),
        part_of("r", None, bars=BARS[:1]),
    ]
    results = {
        "p": {"status": "done", "found": {"bars": told}},
        "q": {"status": "failed", "reason": "ValueError: x"},
    }
    rows = verdicts(parts, results, device="cuda")
    assert [row["verdict"] for row in rows] == ["passed", "missed", "missed", *[UNMEASURED] * 4]
    assert [row["reason"] for row in rows[3:]] == [
        "no | Liger",
        "the part did not measure it",
        "ValueError: x",
        "it has not run yet",
    ]
    table = gpu_parts.bars_table(rows).splitlines()
    assert table[3] == "| p | another | 2 | 2 | 2 | **missed** |"
    assert table[5] == "| p | a fourth | 2 |  |  | unmeasured: no / Liger |"
    assert len({line.count("|") for line in table}) == 1


def test_a_rehearsal_judges_no_speed_but_what_is_exact_anywhere() -> None:
    bars = (BARS[0], Bar("high", "an error", "2", on_gpu=False))
    told = {"low": {"measured": 9, "limit": 2.0}, "high": {"measured": 9, "limit": 2.0}}
    rows = verdicts([part_of("p", None, bars=bars)], {"p": {"found": {"bars": told}}}, device="cpu")
    assert [row["verdict"] for row in rows] == [UNMEASURED, "missed"]


def test_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = check_of(tmp_path)
    nothing = gpu_parts.package("torch", "no_such_package", called="a library")
    assert nothing(check) == "a library is not installed here (no_such_package missing)"
    assert gpu_parts.package("torch", called="torch")(check) is None
    assert gpu_parts.ranks_at_least(4)(check) == "it needs --nproc 4"
    assert gpu_parts.ranks_at_least(4)(check_of(tmp_path, nproc=4)) is None
    assert "set TMPDIR to a larger disk" in str(gpu_parts.disk_gib(1e9)(check))
    properties = argparse.Namespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert gpu_parts.gpu_gib(40)(check) == "it takes 40 GiB of a GPU, and this one has 24"
    assert gpu_parts.gpu_gib(20)(check) is None
    rehearsal = check_of(tmp_path, device="cpu")
    assert gpu_parts.disk_gib(1e9)(rehearsal) is gpu_parts.gpu_gib(40)(rehearsal) is None
    assert gpu_parts.a_gpu(rehearsal) == "it needs a GPU"
    assert gpu_parts.clone(check) is None


def test_errors_in_one_line() -> None:
    assert sentence(KeyError("x")) == "KeyError: 'x'"
    assert sentence(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize("parts", [gpu_table.ONE_GPU, gpu_table.SEVERAL])
def test_the_rows_are_whole(parts: tuple[Part, ...]) -> None:
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    for part in parts:
        keys = [bar.key for bar in part.bars]
        assert len(set(keys)) == len(keys), part.name
        assert part.seconds > 0
    # everything fits the time that is given unasked
    assert sum(part.seconds for part in parts) <= 60 * (10 if parts is gpu_table.SEVERAL else 60)


def test_the_page_in_the_docs_has_every_bar_and_part() -> None:
    page = (TOOLS.parent / "docs" / "gpu_check.md").read_text()
    assert gpu_table.promises() in page
    for part in (*gpu_table.ONE_GPU, *gpu_table.SEVERAL):
        assert f"| `{part.name}` |" in page.split("## The bars")[0], part.name
    for part in gpu_table.ONE_GPU:
        assert f"| `{part.name}` | {part.seconds / 60:g} |" in page, part.name


def record_of(parts: dict[str, Any], bars: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "date": "2026-01-02",
        "command": "python tools/gpu_check.py --out runs/x",
        "minutes": 1.25,
        "machine": {"gpus": ["A GPU, 80 GiB"], "cuda": "12.9", "driver_version": "580.1"},
        "versions": {"torch": "2.13.0", "apex": None},
        "commit": "abc",
        "options": {"hidden": 64, "forms": ["sft"]},
        "parts": parts,
        "bars": bars,
    }


def test_the_page_says_what_it_was_measured_on_and_every_part(tmp_path: Path) -> None:
    parts = [part_of(name, None) for name in ("good", "bad", "later")]
    results = {
        "good": {"status": "done", "found": {"x": 1}, "seconds": 2.0},
        "bad": {"status": "failed", "reason": "ValueError: x", "seconds": 3.0},
    }
    record = record_of(results, [{"verdict": "passed", "part": "good", "what": "w", "bound": "b"}])
    gpu_page.write(record, parts, tmp_path, "name")
    page = (tmp_path / "name.md").read_text()
    assert "A GPU, 80 GiB; CUDA 12.9, driver 580.1. torch 2.13.0. Commit abc." in page
    assert "`python tools/gpu_check.py --out runs/x`; 1.2 minutes. Options: hidden=64." in page
    assert "## Bars: 1 passed, 0 missed, 0 unmeasured" in page
    assert "`good`: done (2 s)\n\n{'x': 1}" in page
    assert "`bad`: failed (3 s): ValueError: x" in page
    assert "later" not in page
    assert sorted(file.name for file in tmp_path.iterdir()) == ["name.json", "name.md"]


def test_a_table_that_breaks_costs_itself(tmp_path: Path) -> None:
    def table(found: Any) -> str:
        return f"{found['x']:.1f}"

    parts = [Part("bad", "bad", (), 1.0, lambda check: {}, table), part_of("good", None)]
    results = {part.name: {"status": "done", "found": {"x": None}, "seconds": 2.0} for part in parts}
    gpu_page.write(record_of(results, []), parts, tmp_path, "name")
    page = (tmp_path / "name.md").read_text()
    assert "`bad`: done (2 s)\n\nIts table cannot be made (TypeError: " in page
    assert "`good`: done (2 s)\n\n{'x': None}" in page
    assert json.loads((tmp_path / "name.json").read_text())["parts"]["bad"]["found"] == {"x": None}


@pytest.mark.parametrize(
    ("status", "verdict", "wrong"),
    [
        ("done", "passed", False),
        ("skipped", UNMEASURED, False),
        ("failed", "passed", True),
        ("done", "missed", True),
    ],
)
def test_anything_wrong_is_the_exit_code(status: str, verdict: str, wrong: bool) -> None:
    record = record_of({"p": {"status": status}}, [{"verdict": verdict}])
    assert gpu_page.anything_wrong(record) is wrong


def test_a_part_is_run_with_what_is_left(tmp_path: Path) -> None:
    check = check_of(tmp_path, minutes=0.0)
    assert run_part(part_of("p", lambda check: {}, seconds=0.1), check)["status"] == "skipped"
