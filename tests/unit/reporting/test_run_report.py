"""asft report: what a page of runs shows, of finished and of running ones, and what it says of folders that hold none."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asft_nemo import cli
from asft_nemo.config.schema import from_dict, to_dict
from asft_nemo.errors import UserError
from asft_nemo.reporting.curves import MOST_POINTS, thinned
from asft_nemo.reporting.runs import distinct_names, read_lines

pytestmark = pytest.mark.usefixtures("keep_logging_and_warnings")


def config(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "recipe": "tiny_cpu",
        "objective": {"name": "asft"},
        "reference": {"form": "resident"},
        "peft": {"name": "none"},
        "model": {"path": "/models/<b>base</b>"},
        "cluster": {"name": "local", "env": ["TOKEN=hidden-from-the-page"]},
        "run": {"world_size": 4},
    }
    return to_dict(from_dict({**given, **changes}))


def step_line(step: int, *, kl: bool) -> dict[str, Any]:
    return {
        "step": step, "loss": 1.0 / step, "nll": 3.0 / step, "weighted_nll": 1.0 / step, "kl": 0.01 * step if kl else None,
        "kl_reverse": None, "token_weight": 0.5, "grad_norm": None if step == 3 else 1.0, "lr": 1e-5, "tokens": 100, "seconds": 2.0,
        "reference_seconds": 0.2, "cache_hit_rate": None, "tokens_per_second": 50.0, "mfu": None, "skipped": step == 3,
    }  # fmt: skip


def make_run(folder: Path, *, steps: int = 6, kl: bool = True, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    record = {"config": config(**changes), "versions": {"torch": "2.13.0"}, "git_commit": "abc<script>"}
    (folder / "run.json").write_text(json.dumps(record))
    lines = [json.dumps(step_line(step, kl=kl)) + "\n" for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def start_line(step: int) -> str:
    return json.dumps({"time": "T", "step": step, "max_steps": 9, "host": "node7", "slurm_job": "12"}) + "\n"


class Reader(HTMLParser):
    """Titles of the pictures, and what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "svg":
            self.labels.append(str(named.get("aria-label")))
        addresses = [named.get(name) or "" for name in ("src", "href", "xlink:href")]
        self.loaded += [a for a in addresses if a and not a.startswith("#")]
        assert tag not in ("script", "link", "b")


def read(page: Path) -> tuple[str, Reader]:
    text, reader = page.read_text(), Reader()
    reader.feed(text)
    return text, reader


def test_a_run_in_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resumed once, alarmed once, its last line half written."""
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as out:
        out.write('{"step": 7, "lo')
    (run / "starts.jsonl").write_text(start_line(0) + start_line(4))
    (run / "alarms.jsonl").write_text(json.dumps({"step": 5, "kind": "nll", "text": "jump of <nll>"}) + "\n")
    assert cli.main(["report", str(run), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (short,) = answer["runs"]
    assert (short["step"], short["max_steps"], short["finished"], short["resumed_after"]) == (
        6,
        9,
        False,
        [4],
    )
    assert (short["skipped_steps"], short["tokens"], short["last"]["kl"]) == (1, 600, 0.06)
    text, reader = read(run / "report.html")
    assert "training, not finished" in text
    assert "jump of &lt;nll&gt;" in text
    assert "T at step 4 on node7, Slurm job 12" in text
    assert "hidden-from-the-page" not in text
    assert "abc&lt;script&gt;" in text
    assert reader.loaded == []
    assert not re.search(r"url\((?!#)|@import", text)
    titles = [label.split(",")[0] for label in reader.labels]
    assert {"Loss", "KL(ref||policy)", "Gradient norm", "Seconds per step"} <= set(titles)
    assert "Cache hit rate" not in titles, "no run has one"


def test_runs_are_overlaid_and_their_difference_is_told(tmp_path: Path) -> None:
    one = make_run(tmp_path / "asft")
    other = make_run(tmp_path / "sft", kl=False, objective={"name": "sft"}, reference={"form": "none"})
    page = tmp_path / "both.html"
    assert cli.main(["report", str(one), str(other), "--out", str(page)]) == 0
    text, _ = read(page)
    table = text[text.index("What differs") :]
    rows = re.findall(r'<tr><th scope="row">([^<]+)</th>((?:<td>[^<]*</td>)+)', table)
    assert ("objective.name", "<td>asft</td><td>sft</td>") in rows
    assert ("reference.form", "<td>resident</td><td>none</td>") in rows
    assert len(rows) == 2


def test_a_run_without_any_kl_has_no_picture_of_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", kl=False, steps=1)
    assert cli.main(["report", str(run)]) == 0
    _, reader = read(run / "report.html")
    assert not any(label.startswith("KL") for label in reader.labels)
    assert any(label.startswith("Negative log likelihood") for label in reader.labels)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{tmp}/runs/medcal"], r"medcal does not exist: did you mean .*runs/medical\?"),
        (["{tmp}/runs"], r"runs is no run but holds 2: give one of .*runs/empty, .*runs/medical"),
        (["{tmp}/other"], r"other holds no run\.json, so it is no run: give the run\.dir of a training run"),
        (["{tmp}/runs/medical/run.json"], r"run\.json is a file: give the run\.dir of a training run, its folder"),
        (["{tmp}/runs/empty"], r"the run in .*empty has no step yet: call asft report again when it has"),
        (["{tmp}/runs/medical", "{tmp}/runs/../runs/medical"], r"medical is given twice: name each run once"),
        (["a", "b", "c", "d", "e", "f", "g"], r"7 runs are more than one picture can tell apart: give at most 6"),
        (["{tmp}/runs/medical", "--out", "/proc/none/x.html"], r"x\.html cannot be written \(.+\): give --out FILE"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs" / "medical")
    make_run(tmp_path / "runs" / "empty", steps=0)
    (tmp_path / "other").mkdir()
    assert cli.main(["report", *(word.replace("{tmp}", str(tmp_path)) for word in words)]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert re.search(said, sentence), sentence


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("run.json", "{}", r"run\.json holds no settings of a run: give the run\.dir"),
        ("run.json", "[", r"run\.json cannot be read"),
        ("metrics.jsonl", '{"step": 4}\n', r"metrics\.jsonl has no seconds at step 4: give the run\.dir"),
        ("starts.jsonl", '{"step": 0}\n', r"starts\.jsonl has no max_steps at step 0"),
    ],
)
def test_files_of_another_program_are_called_so(
    file: str, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (make_run(tmp_path / "run") / file).write_text(text)
    assert cli.main(["report", str(tmp_path / "run")]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert re.search(said, sentence), sentence


def test_a_jump_of_one_step_of_many_is_still_to_be_seen() -> None:
    values = np.ones(10 * MOST_POINTS + 3)
    values[777] = 50.0
    steps, means, low, high = thinned(np.arange(1.0, len(values) + 1), values)
    assert len(steps) == len(means) == MOST_POINTS
    assert high.max() == 50.0
    assert low.min() == 1.0
    assert abs(steps[high.argmax()] - 778) <= 10


def test_names_are_as_long_as_they_must_be() -> None:
    assert distinct_names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    assert distinct_names([Path("/a/x"), Path("/b/y")]) == ["x", "y"]


@pytest.mark.parametrize("torn", ["{", "3", '{"step": 2', "\x00\x00"])
def test_what_follows_a_torn_line_is_left_out(torn: str, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"step": 1}\n' + torn)
    assert read_lines(file) == [{"step": 1}]


@pytest.mark.parametrize("damaged", ['{"st\n{"step": 3}\n', "3\n", '{"loss": 1}\n', "\x00\n"])
def test_a_damaged_line_is_refused(damaged: str, tmp_path: Path) -> None:
    """No stopped writer leaves that, and the steps behind it would be missing from the curves."""
    file = tmp_path / "lines.jsonl"
    file.write_text('{"step": 1}\n' + damaged)
    with pytest.raises(UserError, match=r"lines\.jsonl is damaged in line 2 of [23]: restore it"):
        read_lines(file)
