"""Profiled steps: what they leave behind, that they add up, and that they are the steps of a run without a profile."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankGroup
from real_runs import VALID, all_tensors, metrics, settings_of, without_times

from asft_nemo.profiling.rooms import FROZEN_MODEL, PREFIX, ROOMS
from asft_nemo.profiling.trace import STEP

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

CLOCKS = 1e-3  # share of a step by which two clocks may differ


@pytest.fixture(scope="module")
def runs(ranks4: RankGroup, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """asft with a resident reference at TP2 x PP2, three steps: plain, and with two of them profiled."""
    folder = tmp_path_factory.mktemp("profiled")
    cases = (
        ("plain", "jobs:train_steps", {}),
        ("profiled", "profile_jobs:train_with_clocked_ranges", {"trainer.profile": "steps:2-3"}),
    )
    for name, job, more in cases:
        settings = {
            **settings_of(model, folder / name, trainer__max_steps=3, trainer__micro_batch_size=2),
            **more,
        }
        ranks4.run(job, settings=settings, valid=VALID)
    return {name: folder / name for name in ("plain", "profiled")}


def read_rank(run: Path, rank: int) -> dict[str, Any]:
    return json.loads((run / "profile" / f"rank_{rank}.json").read_text())


def test_the_same_steps(runs: dict[str, Path]) -> None:
    plain, profiled = (without_times(metrics(runs[name])) for name in ("plain", "profiled"))
    assert profiled == plain
    assert len(plain) == 3
    weights, found = (all_tensors(runs[name] / "checkpoints" / "latest") for name in ("plain", "profiled"))
    assert [key for key in weights if not torch.equal(found[key], weights[key])] == []


def test_every_rank_leaves_a_trace_with_the_rooms_it_was_in(runs: dict[str, Path]) -> None:
    for rank in range(4):
        file = runs["profiled"] / "profile" / f"rank_{rank}.trace.json.gz"
        trace = json.loads(gzip.decompress(file.read_bytes()))
        names = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
        assert names.count(STEP) == 2
        there = {room for room in ROOMS if PREFIX + room in names}
        assert there == set(ROOMS) - (set() if rank >= 2 else {"loss"})  # the last stage alone has a loss
        for of_every_micro_batch in ("forward", "backward", FROZEN_MODEL):
            assert names.count(PREFIX + of_every_micro_batch) == 2 * 4
        assert "megatron/forward-recv" in names or rank < 2


def test_the_parts_add_up_to_the_step(runs: dict[str, Path]) -> None:
    lines = {line["step"]: line for line in metrics(runs["profiled"])}
    for rank in range(4):
        found = read_rank(runs["profiled"], rank)
        assert found["steps"] == [2, 3]
        assert sum(found["parts"].values()) == pytest.approx(found["seconds"], rel=1e-9)
        assert min(found["parts"].values()) >= 0
        assert found["parts"]["idle"] == 0  # a CPU is never idle here: Python works
        for room in {"reference", "forward", "backward", "optimizer", "data"}:
            assert found["parts"][room] > 0, room
        assert (found["parts"]["loss"] > 0) == (rank >= 2)
        assert found["parts"]["communication"] <= found["communication"] * (1 + 1e-9)
        assert found["traffic"]["all_reduce"]["count"] > 0
        assert found["traffic"]["send_recv"]["seconds"] > 0
        assert found["peak_bytes"]["process"] > 2**20
        # However busy the machine is, the range is open for no longer than the clock around it runs, here, and for no less than the clock
        # within it, in metrics.jsonl, which rank 2 writes. Either clock may differ from the profiler's by its rounding.
        around = json.loads((runs["profiled"] / f"ranges_{rank}.json").read_text())
        for seconds, step, most in zip(found["step_seconds"], found["steps"], around, strict=True):
            least = lines[step]["seconds"] if rank == 2 else 0
            assert least * (1 - CLOCKS) <= seconds <= most * (1 + CLOCKS)


def test_the_pages_are_for_a_human(runs: dict[str, Path]) -> None:
    folder = runs["profiled"] / "profile"
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [
            "summary.md",
            *(f"rank_{rank}.{end}" for rank in range(4) for end in ("json", "md", "trace.json.gz")),
        ]
    )
    summary = (folder / "summary.md").read_text()
    assert "TP2 x PP2 x DP1" in summary
    assert sum(line.startswith(f"| {rank} |") for rank in range(4) for line in summary.splitlines()) == 4
    assert "Slowest: rank" in summary
    page = (folder / "rank_2.md").read_text()
    assert "TP 0, PP 1" in page
    assert "100.0%" in page
    assert "head at every position" in page  # rank 2 writes the metrics and knows the speed


def test_a_full_disk_ends_a_ranks_profile_and_not_the_run(
    ranks4: RankGroup, model: Path, tmp_path: Path
) -> None:
    """No rank leaves the others waiting, neither in the next step nor in the summary."""
    settings = {
        **settings_of(model, tmp_path / "run", trainer__max_steps=3),
        "trainer.profile": "steps:1-2",
    }
    ranks4.run("profile_jobs:train_with_spoilt_traces", settings=settings, valid=VALID)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    folder = tmp_path / "run" / "profile"
    assert sorted(file.name for file in folder.iterdir()) == [
        "rank_0.json", "rank_0.md", "rank_0.trace.json.gz", "summary.md",
    ]  # fmt: skip
    told = [line for line in (folder / "summary.md").read_text().splitlines() if "wrote none" in line]
    assert [line.split(": ", 1)[0] for line in told] == [f"* rank {rank} wrote none" for rank in (1, 2, 3)]
    assert "No space left on device" in told[0]
    assert all("the trace of step 1" in line for line in told)
    assert "no range asft/step" in told[2]


@pytest.mark.long
def test_resumed_within_its_steps_and_after_them(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """With virtual stages: a rank's two chunks take turns."""
    run = tmp_path / "run"
    settings = {
        **settings_of(model, run, trainer__max_steps=4, trainer__checkpoint_every=1, parallel__vpp_size=2),
        "trainer.profile": "steps:2-3",
    }
    ranks4.run("jobs:train_and_die", settings=settings, valid=VALID, after_step=2)
    assert not list((run / "profile").glob("rank_*"))  # the window was not over
    resumed = {**settings, "trainer.resume": "must"}
    ranks4.run("jobs:train_and_die", settings=resumed, valid=VALID, after_step=3)
    for rank in range(4):
        found = read_rank(run, rank)
        assert found["steps"] == [3]
        assert sum(found["parts"].values()) == pytest.approx(found["seconds"], rel=1e-9)
        trace = json.loads(gzip.decompress((run / "profile" / f"rank_{rank}.trace.json.gz").read_bytes()))
        names = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
        assert names.count(STEP) == 1
        for of_every_chunk in ("forward", "backward", FROZEN_MODEL):
            assert names.count(PREFIX + of_every_chunk) == 2 * 8  # micro batches
    said = ranks4.run("profile_jobs:warnings_of_profile", settings=resumed, valid=VALID)
    assert said[0] == [
        "trainer.profile=steps:2-3 profiles nothing: the run goes on after step 3; name later steps, of 4 or more"
    ]
    assert said[1:] == [[]] * 3
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]


def operations(folder: Path, world_size: int) -> list[tuple[float, float]]:
    """Of the policy and the frozen models in each step, from what metrics.jsonl says of speed."""
    return [
        (
            line["tflops_per_gpu"] * line["seconds"] * world_size,
            line["reference_tflops_per_gpu"] * line["seconds"] * world_size,
        )
        for line in metrics(folder)
    ]


@pytest.mark.parametrize(
    ("packing", "layouts"),
    [
        (False, ({"parallel.tp_size": 2}, {"parallel.cp_size": 2}, {})),  # {}: two data-parallel ranks
        pytest.param(True, ({"parallel.tp_size": 2}, {}), marks=pytest.mark.long),
    ],
)
def test_operations_of_a_step_are_the_same_at_every_layout(
    packing: bool, layouts: tuple[dict[str, Any], ...], ranks2: RankGroup, model: Path, tmp_path: Path
) -> None:
    found = []
    for number, layout in enumerate(layouts):
        settings = {
            **settings_of(model, tmp_path / str(number), trainer__max_steps=1, data__packing=packing),
            "run.world_size": 2,
            "parallel.pp_size": 1,
            "parallel.tp_size": 1,
            **layout,
        }
        ranks2.run("jobs:train_steps", settings=settings, valid=VALID)
        found += operations(tmp_path / str(number), 2)
    for one in found[1:]:
        assert one == pytest.approx(found[0], rel=1e-9)


def test_speed_is_told(runs: dict[str, Path]) -> None:
    for line in metrics(runs["plain"]):
        assert line["mfu"] is None
        assert 0 < line["reference_tflops_per_gpu"] < line["tflops_per_gpu"]
