"""The benchmark of grading: its completions are what it says, it runs as a command, and it judges its bars rightly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from asft_eval import EvaluationError
from asft_eval.sandbox import open_sandbox

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path.insert(0, str(TOOLS))

import bench_grading  # noqa: E402


def test_the_mixture_of_a_problem():
    answers = [rf"\frac{{{n}}}{{7}}" for n in range(100)]
    texts = bench_grading.completions(3, answers, r"Adding gives $\boxed{\frac{3}{7}}$.")
    assert len(texts) == bench_grading.SAMPLES
    assert sum(len(text) > 10_000 for text in texts) == 2
    assert bench_grading.nearly(r"\frac{3}{7}") == r"\frac{3}{0}"
    assert bench_grading.nearly("x") == "-(x)"


@pytest.mark.slow
def test_it_runs_and_writes(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("math_verify")
    try:
        open_sandbox().close()
    except EvaluationError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("ASFT_DATA_DIR", str(data_dir))
    words = [sys.executable, str(TOOLS / "bench_grading.py"), "--problems", "2", "--programs", "2", "--repeats", "1"]  # fmt: skip
    done = subprocess.run(
        [*words, "--without-alone", "--out", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench_grading.json").read_text())
    rows = found["results"]
    # nine a problem, and the second's answer is p - q: with its sign turned twice it is right again
    assert (rows["mathematics"]["completions"], rows["mathematics"]["right"]) == (32, 19)
    assert (rows["mathematics, all different"]["right"], rows["code"]["right"]) == (0, 2)
    assert rows["choice"]["completions"] == 8195
    assert found["bars"] == []
    assert "| mathematics | 32 | 19 |" in (tmp_path / "bench_grading.md").read_text()


def test_bars_are_of_full_size_and_of_the_slowest_round():
    def row(completions: int, seconds: float) -> dict[str, object]:
        return {"completions": completions, "seconds": [1.0, seconds]}

    full = {"mathematics": row(8000, 59.0), "code": row(164, 20.5)}
    assert [bar["met"] for bar in bench_grading.bars(full)] == [True, False]
    assert bench_grading.bars({"mathematics": row(32, 1.0), "code": row(2, 1.0)}) == []
