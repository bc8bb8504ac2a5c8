"""`asft demo --quick`, really: import, four ranks, export, reload, measure, report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asft_nemo import cli

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow, pytest.mark.timeout(600)]

OBJECTIVES = ("sft", "asft")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "a demo"
    done = subprocess.run(
        [sys.executable, "-m", "asft_nemo", "demo", "--quick", "--out", str(folder)],
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == f"report: {folder / 'report.html'}"
    for number in range(1, 7):
        assert f"[{number}/6] " in done.stderr
    return folder


@pytest.fixture(scope="module")
def values(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_every_run_is_there_as_asft_train_leaves_it(out: Path, values: dict[str, Any]):
    steps = values["protocol"]["steps"]
    for name in OBJECTIVES:
        run = out / "runs" / f"{name}_seed0"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        config = json.loads((run / "run.json").read_text())["config"]
        assert config["objective"]["name"] == name
        assert (config["parallel"]["tp_size"], config["parallel"]["pp_size"]) == (2, 2)
        assert (run / "checkpoints" / "latest" / "weights" / ".metadata").is_file()
        assert (out / "models" / f"{name}_seed0" / "model.safetensors").is_file()


def test_the_reference_is_the_base_and_the_policy_leaves_it(values: dict[str, Any]):
    assert values["training"]["asft"]["first_kl"] == [0.0]
    assert values["training"]["asft"]["last"]["kl"][0] > 0
    assert values["training"]["sft"]["first_kl"] == [None]
    assert values["round_trip"]["identical"] is True


def test_figures_are_measured_on_the_exported_models(out: Path, values: dict[str, Any]):
    skills = values["skills"]
    for name in ("base", *OBJECTIVES):
        folder = out / "evaluation" / (name if name == "base" else f"{name}_seed0")
        result = json.loads((folder / "results.json").read_text())
        for skill, figures in result["suites"].items():
            assert values["models"][name]["skills"][skill]["value"] == pytest.approx(figures["accuracy"])
            assert figures["n"] == skills["tests"][skill]
        old = [result["suites"][skill]["accuracy"] for skill in skills["old"]]
        assert values["models"][name]["old"]["value"] == pytest.approx(sum(old) / len(old))
    assert values["models"]["base"]["forward_kl"]["value"] == 0
    assert values["models"]["base"]["old"]["value"] > 0.9
    for name in OBJECTIVES:
        assert values["models"][name]["forward_kl"]["value"] > 0
        assert values["models"][name]["forgotten"]["value"] == pytest.approx(
            values["models"]["base"]["old"]["value"] - values["models"][name]["old"]["value"]
        )


def test_the_page_says_what_was_measured_and_needs_nothing_else(out: Path, values: dict[str, Any]):
    html = (out / "report.html").read_text()
    assert values["headline"].replace("'", "&#x27;") in html
    assert html.count("<svg") == 5
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", html)
    assert "quick run" in html
    for model in values["models"].values():
        assert f"{100 * model['new']['value']:.1f}" in html
        assert f"{100 * model['old']['value']:.1f}" in html


def test_a_second_demo_does_not_take_a_folder_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keep_logging_and_warnings: None
):
    (tmp_path / "thesis.txt").write_text("all of it")
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "choose another folder with --out" in error
    assert len(error.strip().splitlines()) <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
