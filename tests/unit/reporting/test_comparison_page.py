"""asft compare: what its three files hold, what a real browser makes of the page, and what it says of wrong input."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from unit.demo.test_report import Reader
from unit.reporting.comparison_cases import MODELS, Browser, chromium, make_results
from unit.reporting.test_run_report import make_run

from asft_nemo import cli
from asft_nemo.reporting.comparison_pictures import all_pictures
from asft_nemo.reporting.runs import RunFiles, read_runs

pytestmark = pytest.mark.usefixtures("keep_logging_and_warnings")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def out(results: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of all models, two of them with the runs that made them."""
    folder = tmp_path_factory.mktemp("comparison")
    runs = {name: make_run(folder / "runs" / name) for name in ("sft", "asft")}
    words = [f"{name}={path}" for name, path in results.items()]
    given = [word for name, path in runs.items() for word in ("--run", f"{name}={path}")]
    assert cli.main(["compare", *words, *given, "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_the_page_is_whole_and_refers_to_nothing_outside(out: Path):
    html = (out / "comparison.html").read_text()
    read = Reader(html)
    assert not read.open
    assert all(address.startswith("#") for address in read.addresses)
    assert not {"script", "link", "img", "iframe"} & set(read.tags)
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(read.ids) == len(set(read.ids))
    assert 'name="viewport"' in html
    labels = re.findall(r'aria-label="([^"]+)"', html)
    for start in ("Right answers in per cent, a bar", "Right answers in per cent, mean of suites, over KL", "How often", "Share of tokens", "Loss"):  # fmt: skip
        assert any(label.startswith(start) for label in labels), start


def test_the_three_files_say_the_same(out: Path):
    values = json.loads((out / "comparison.json").read_text())
    text = " ".join(" ".join(Reader((out / "comparison.html").read_text()).words).split())
    table = (out / "comparison.md").read_text()
    for score in values["scores"]:
        shown = [f"{100 * score[bound]:.1f}" for bound in ("value", "low", "high")]
        assert f"{shown[0]} [{shown[1]}, {shown[2]}]" in table
        assert shown[0] in text
        assert f"{shown[1]} to {shown[2]}" in text
    marked = {(row["model"], row["value"] > 0) for row in values["differences"] if row["significant"]}
    assert marked == {("asft", True), ("dft_of_a_long_name_and_seed0", False)}
    assert ("▲" in table, "▼" in table) == (True, True)
    for one in values["examples"]:
        assert one["id"] in text
        assert one["own"]["correct"] == (one["difference"] > 0) != one["first"]["correct"]
    kinds = {(one["model"], one["suite"], one["difference"] > 0) for one in values["examples"]}
    assert len(kinds) == len(values["suites"]) * 3 * 2


def test_on_a_phone_nothing_is_wider_than_the_screen(out: Path, tmp_path: Path):
    chromium()
    found = Browser(out / "comparison.html", tmp_path, width=360, dark=True).measured()
    assert found["width"] == 360
    assert found["content"] <= 360
    assert found["cells"] == []
    assert found["inner"]
    assert max(found["inner"]) <= 0
    assert found["paper"] == "rgb(20, 23, 26)"


def test_a_picture_of_it_shows_text_and_every_model_in_its_colour(out: Path, tmp_path: Path):
    chromium()
    picture = matplotlib.image.imread(
        Browser(out / "comparison.html", tmp_path, width=390, dark=False).screenshot()
    )
    assert picture.shape[:2] == (2600, 390)
    seen = (255 * picture[:, :, :3]).round().astype(int).reshape(-1, 3)
    for colour in ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167)):
        assert (abs(seen - colour).max(1) <= 2).sum() > 500, colour
    assert 0.005 < (seen.max(1) < 100).mean() < 0.3
    assert (seen.min(1) == 255).mean() > 0.5, "light paper"
    filled = (seen.reshape(2600, 390, 3).max(2) < 100).any(1)
    assert filled[2000:].any(), "the page goes on"


def test_without_matplotlib_the_page_says_what_is_missing(
    results: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    find = importlib.util.find_spec
    missing: Any = lambda name: None if name == "matplotlib" else find(name)  # noqa: E731
    monkeypatch.setattr("asft_nemo.commands.comparison.find_spec", missing)
    words = [f"{name}={results[name]}" for name in ("base", "asft")]
    assert cli.main(["compare", *words, "--out", str(tmp_path)]) == 0
    html = (tmp_path / "comparison.html").read_text()
    assert "No pictures: matplotlib is not installed" in html
    assert "<svg" not in html


def test_two_checkpoints_of_one_run_are_compared_with_its_curves(
    results: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The run is read once, however its folder is written, and both names have its curves."""
    run = make_run(tmp_path / "run")
    read: list[list[Path]] = []
    given: list[dict[str, RunFiles]] = []
    monkeypatch.setattr(
        "asft_nemo.reporting.runs.read_runs", lambda folders: read.append(folders) or read_runs(folders)
    )
    monkeypatch.setattr(
        "asft_nemo.reporting.comparison_pictures.all_pictures",
        lambda compared, runs: given.append(runs) or all_pictures(compared, runs),
    )
    words = [f"base={results['base']}", f"latest={results['asft']}", f"best={results['sft']}"]
    runs = ["--run", f"latest={run}", "--run", f"best={run}/../{run.name}"]
    assert cli.main(["compare", *words, *runs, "--out", str(tmp_path / "out")]) == 0
    assert read == [[run]]
    assert 'aria-label="Loss' in (tmp_path / "out" / "comparison.html").read_text()
    (found,) = given
    assert {name: (one.name, one.folder) for name, one in found.items()} == {
        "latest": ("latest", run),
        "best": ("best", run),
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["base"], r"cannot use 'base': write NAME=RESULT_DIR, each name once"),
        (["base={base}", "base={sft}"], r"cannot use 'base=.*': write NAME=RESULT_DIR, each name once"),
        (["base={base}", "--run", "asft=x"], r"--run asft has no result of that name: use some of base"),
        (["base={base}", "--run", "base=/nowhere/run"], r"/nowhere/run does not exist"),
        (["base={base}", "asft=/nowhere"], r"/nowhere holds no results\.json: evaluate a model"),
        (["base={base}", "--out", "/proc/none"], r"/proc/none cannot be written \(.*\): give --out a folder"),
    ],
)
def test_wrong_input_is_one_sentence(
    words: list[str],
    said: str,
    results: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    given = [word.format(**{name: str(path) for name, path in results.items()}) for word in words]
    out = [] if "--out" in words else ["--out", str(tmp_path)]
    assert cli.main(["compare", *given, *out]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert re.search(said, sentence), sentence


def test_the_models_are_those_of_the_page(out: Path):
    html = (out / "comparison.html").read_text()
    for name in MODELS:
        assert f"</span>{name}" in html
