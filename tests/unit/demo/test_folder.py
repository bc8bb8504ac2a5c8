"""The demo's folder: what it replaces, what it refuses, and what a stopped demo leaves."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from asft_nemo.demo import folder, plan
from asft_nemo.demo import run as demo
from asft_nemo.demo.stages import Stages, duration, watched
from asft_nemo.errors import UserError


def finished(out: Path) -> Path:
    with folder.opened(out, needed_bytes=0) as where:
        (where / "runs" / "x").mkdir(parents=True)
        folder.write_report(where, page="<p>", values={"a": 1})
    return out


def test_a_new_folder_gets_a_whole_report(tmp_path: Path):
    out = finished(tmp_path / "a" / "b")
    assert (out / "report.html").read_text() == "<p>"
    assert json.loads((out / "report.json").read_text()) == {"a": 1}
    assert not list(out.glob(".*unfinished"))


def test_a_former_demo_is_replaced_and_other_files_stay(tmp_path: Path):
    out = finished(tmp_path / "demo")
    (out / "notes.txt").write_text("mine")
    with folder.opened(out, needed_bytes=0) as where:
        assert not (where / "report.html").exists()
        assert not (where / "runs").exists()
        assert (where / "notes.txt").read_text() == "mine"


def test_a_stopped_demo_leaves_no_report_and_can_be_replaced(tmp_path: Path):
    out = finished(tmp_path / "demo")
    with pytest.raises(KeyboardInterrupt), folder.opened(out, needed_bytes=0):
        raise KeyboardInterrupt
    assert not (out / "report.html").exists()
    assert not (out / "report.json").exists()
    finished(out)


@pytest.mark.parametrize("marker", [None, "{}", "not json", '["asft demo 1"]'])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, marker: str | None):
    (tmp_path / "report.html").write_text("mine")
    if marker is not None:
        (tmp_path / folder.MARKER).write_text(marker)
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="choose another folder with --out"):
        demo.main(quick=True, out_dir=tmp_path)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="is a file"), folder.opened(tmp_path / "x", needed_bytes=0):
        pass
    with pytest.raises(UserError, match="cannot write"), folder.opened(tmp_path / "x" / "y", needed_bytes=0):
        pass


def test_two_demos_do_not_share_a_folder(tmp_path: Path):
    with folder.opened(tmp_path / "demo", needed_bytes=0) as where:
        (where / "data").mkdir()
        with pytest.raises(UserError, match="another demo is running"), folder.opened(where, needed_bytes=0):
            pass
        assert (where / "data").is_dir()


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path):
    with pytest.raises(UserError, match="make room"), folder.opened(tmp_path / "demo", needed_bytes=10**18):
        pass


def test_links_are_removed_not_followed(tmp_path: Path):
    out = finished(tmp_path / "demo")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    (out / "models").symlink_to(precious)
    with folder.opened(out, needed_bytes=0):
        assert not (out / "models").exists()
    assert (precious / "file").read_text() == "kept"


@pytest.mark.parametrize("chosen", [plan.FULL, plan.QUICK])
def test_the_plan_fits_its_budget_and_its_data(chosen: plan.Plan, tmp_path: Path):
    assert sum(demo.expected_seconds(chosen).values()) < (90 if chosen is plan.QUICK else 10 * 60)
    plan.write_data(chosen, tmp_path / "data")
    rows = (tmp_path / "data" / "train_seed0.jsonl").read_text().splitlines()
    assert len(rows) == chosen.examples >= chosen.global_batch_size
    prompts = {json.loads(row)["prompt"] for row in rows}
    for suite in plan.suites(chosen):
        assert not prompts & {example.prompt for example in suite.examples}
    assert len({entry.name for entry in plan.entries(chosen)}) == len(chosen.objectives) * len(chosen.seeds)


def test_what_is_left_follows_the_machines_pace():
    stages = Stages({"a": 100.0, "b": 50.0})
    assert stages.left() == 150
    stages.seconds["a"] = 200.0
    assert stages.left() == 100
    assert (duration(0.2), duration(72), duration(200)) == ("1 s", "72 s", "3 min")


def test_trained_runs_are_said_as_their_metrics_grow(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    files = {name: tmp_path / f"{name}.jsonl" for name in "abc"}

    def said(words: str) -> bool:
        deadline = time.monotonic() + 120
        while words not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        return words in caplog.text

    with caplog.at_level("INFO"), watched(files, steps=2):
        files["a"].write_text("{}\n{}\n")
        assert said("a is trained (1 of 3)\n")
        files["b"].write_text("{}\n{}\n")
        files["c"].write_text("{}\n")
        assert said("b is trained (2 of 3), about ")
    assert "c is trained" not in caplog.text
