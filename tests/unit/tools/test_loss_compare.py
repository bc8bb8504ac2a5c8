"""Comparing two commits: differences and where they are, and the tool on a small repository whose commits train differently."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path.insert(0, str(TOOLS))

import loss_compare  # noqa: E402
from bench import loss_runs  # noqa: E402
from bench.compared import difference  # noqa: E402

LINES: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.0, "kl": 0.0, "kl_reverse": None},
    {"step": 2, "loss": 1.0, "kl": 0.5, "kl_reverse": None},
]


def changed(step: int, **values: Any) -> list[dict[str, Any]]:
    return [{**line, **values} if line["step"] == step else dict(line) for line in LINES]


def test_the_same_lines_have_the_same_bits() -> None:
    found = difference(LINES, changed(1))
    assert found.bits
    assert (found.size, found.said()) == (0.0, "same bits")


@pytest.mark.parametrize(
    ("other", "size", "said"),
    [
        (changed(2, loss=1.5), 0.25, "2.5e-01 (loss, step 2)"),  # of 2.0, the largest loss
        (changed(2, loss=math.nextafter(1.0, 2.0)), 2.0**-53, "1.1e-16 (loss, step 2)"),
        (changed(1, kl=1e-9), 2e-9, "2.0e-09 (kl, step 1)"),
        (changed(2, kl=0.4, loss=1.1), 0.2, "2.0e-01 (kl, step 2)"),
        (changed(1, kl_reverse=0.0), math.inf, "inf (kl_reverse, step 1)"),
        (changed(1, loss=None), math.inf, "inf (loss, step 1)"),
        (LINES[:1], math.inf, "inf (2 steps against 1)"),
        ([{"step": 1, "loss": 2.0}, LINES[1]], math.inf, "inf (kl, step 1)"),
    ],
)
def test_the_largest_difference_and_its_place(other: list[dict[str, Any]], size: float, said: str) -> None:
    found = difference(LINES, other)
    assert found.size == pytest.approx(size, rel=1e-12)
    assert not found.bits
    assert found.said() == said


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_finite_number_differs_from_every_number(value: float) -> None:
    broken = changed(2, loss=value)
    for first, second in ((LINES, broken), (broken, LINES), (broken, changed(2, loss=-math.inf))):
        found = difference(first, second)
        assert found.said() == "inf (loss, step 2)"
        assert not found.bits
    assert difference(broken, changed(2, loss=value)).bits, "neither run has a number there"
    elsewhere = difference(broken, [{**LINES[0], "loss": 2.5}, broken[1]])
    assert elsewhere.said() == "2.5e-01 (loss, step 1)", "relative to the largest finite loss"


def test_a_metric_that_is_new_is_named_and_is_no_difference() -> None:
    found = difference(LINES, [{**line, "mfu": 0.4} for line in LINES])
    assert found.bits
    assert found.added == ("mfu",)


STUB = {
    "asft_nemo/__init__.py": "",
    "asft_nemo/config/__init__.py": "",
    "asft_nemo/config/load.py": '''
from types import SimpleNamespace


def compose(words):
    settings = dict(word.split("=", 1) for word in words)
    size = int(settings.get("parallel.tp_size", 1)) * int(settings.get("parallel.pp_size", 1))
    run = SimpleNamespace(world_size=size, dir=settings["run.dir"])
    return SimpleNamespace(run=run, steps=int(settings["trainer.max_steps"]), name=settings["objective"])
''',
    "asft_nemo/launch_local.py": '''
import json
from pathlib import Path

from asft_nemo.rate import RATE


def launch_many(runs):
    assert len({run.run.world_size for run in runs}) == 1
    for run in runs:
        Path(run.run.dir).mkdir()
        lines = [{"step": n, "loss": RATE**n, "seconds": id(run) / 7, "grad_norm": 1.0} for n in range(1, run.steps + 1)]
        (Path(run.run.dir) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
''',
    "asft_nemo/rate.py": "RATE = 0.5\n",
    "recipes/tiny_cpu.py": "def fragment():\n    return {}\n",
    "assets/tiny-base/model.safetensors": "weights",
}  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three commits, the last two tagged `one` and `moved`: the same training from another file. The tool works on it instead of on ours."""
    folder = tmp_path / "repository"
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "nobody")
        monkeypatch.setenv(f"{name}_EMAIL", "nobody@example.org")
    (folder / "asft_nemo").mkdir(parents=True)
    run_git(folder, "init", "--quiet")
    commit(folder, {"asft_nemo/__init__.py": ""}, tag="empty")
    commit(folder, STUB, tag="one")
    renamed = STUB["asft_nemo/launch_local.py"].replace("asft_nemo.rate", "asft_nemo.speed")
    commit(
        folder, {"asft_nemo/launch_local.py": renamed, "asft_nemo/speed.py": "RATE = 1 / 2\n"}, tag="moved"
    )
    monkeypatch.setattr(loss_compare, "ROOT", folder)
    (folder / "tools").symlink_to(TOOLS)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return folder


def commit(folder: Path, files: dict[str, str], *, tag: str) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    run_git(folder, "add", *files)
    run_git(folder, "commit", "--quiet", "-m", f"work on {tag}")
    run_git(folder, "tag", tag)


def run_git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", folder, *words], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def worktrees(folder: Path) -> int:
    return run_git(folder, "worktree", "list").count("\n")


def test_a_refactor_shows_the_same_bits(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["one", "moved", "--objectives", "sft", "asft", "--steps", "3", "--out", str(tmp_path / "out")]
    assert loss_compare.main(words) == 0
    said = capsys.readouterr()
    assert "| asft | tp2_pp2 | same bits |" in said.out
    assert "(work on one) against" in said.out
    assert "step 12 of 12" in said.err
    record = json.loads((tmp_path / "out" / "loss_compare.json").read_text())
    assert [(row["objective"], row["layout"]) for row in record["runs"]] == [
        ("sft", "tp1"), ("asft", "tp1"), ("sft", "tp2_pp2"), ("asft", "tp2_pp2"),
    ]  # fmt: skip
    assert record["within"]
    assert (tmp_path / "out" / "loss_compare.md").read_text() == loss_compare.table(record)
    assert worktrees(repository) == 1


def test_the_working_tree_is_taken_as_it_is_and_a_tolerance_is_what_was_asked_for(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "asft_nemo" / "speed.py").write_text("from asft_nemo.fresh import RATE\n")
    (repository / "asft_nemo" / "fresh.py").write_text("RATE = 0.505\n")  # git does not know it yet
    words = ["moved", "--objectives", "dft", "--layouts", "tp1", "--steps", "2"]
    assert loss_compare.main(words) == 1
    said = capsys.readouterr().out
    assert "the working tree, 3 files of it changed" in said  # the link to the tools is one
    assert "| dft | tp1 | 1.0e-02 (loss, step 2) |" in said
    assert loss_compare.main([*words, "--tolerance", "0.02"]) == 0
    assert loss_compare.main([*words, "--tolerance", "0.009"]) == 1


def test_golden_files_hold_a_line_a_step(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loss_compare, "GOLDEN", tmp_path / "golden")
    assert loss_compare.main(["--golden", "--objectives", "sft"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "golden" / "sft.jsonl").read_text().splitlines()]
    assert len(lines) == loss_runs.STEPS
    assert lines[1] == {"step": 2, "loss": 0.25, "grad_norm": 1.0}


def test_what_cannot_be_compared_is_refused_with_a_reason(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*words: str) -> str:
        assert loss_compare.main([*words, "--objectives", "sft", "--layouts", "tp1"]) == 2
        assert worktrees(repository) == 1
        return capsys.readouterr().err

    assert f"nowhere is no commit of {repository}: name one that git log shows" in refusal("one", "nowhere")
    assert "no commit was named" in refusal()
    assert "--steps 0 trains nothing" in refusal("one", "--steps", "0")
    assert "cannot train these runs, asft_nemo/launch_local.py is missing" in refusal("empty", "one")
    commit(
        repository, {"asft_nemo/rate.py": "RATE = 1 /\n", "asft_nemo/speed.py": "RATE = 1 /\n"}, tag="broken"
    )
    assert "could not train the runs:" in (said := refusal("one", "broken"))
    assert "SyntaxError" in said


def test_a_merge_that_is_not_finished_is_refused(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_git(repository, "checkout", "--quiet", "-b", "other", "one")
    commit(repository, {"asft_nemo/launch_local.py": "def launch_many(): ...\n"}, tag="other_way")
    merge = ["git", "-C", str(repository), "merge", "moved"]
    assert subprocess.run(merge, capture_output=True, timeout=60).returncode != 0
    assert loss_compare.main(["one", "--steps", "1"]) == 2
    assert "asft_nemo/launch_local.py is not merged yet: finish the merge first" in capsys.readouterr().err


def test_code_of_another_tree_is_not_trained(tmp_path: Path) -> None:
    """Where the environment's own `asft_nemo` is found instead of the tree's, nothing would be compared."""
    (tmp_path / "runs.json").write_text("[]")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, TOOLS / "bench" / "loss_runs.py", tmp_path / "runs.json", tmp_path],
        capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"and not from {tmp_path}" in done.stderr
