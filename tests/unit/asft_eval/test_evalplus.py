"""The file that evalplus grades holds whole programs under its own names of tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from asft_eval.backends.fake import FakeBackend
from asft_eval.evalplus import samples_file, write_evalplus
from asft_eval.requests import CHOICES, Part
from asft_eval.run import evaluate
from asft_eval.types import Suite


def lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_programs_of_humaneval_are_whole(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASFT_DATA_DIR", str(data_dir))
    (tmp_path / "config.json").write_text("{}")
    evaluate(
        tmp_path,
        ["humaneval"],
        backend=FakeBackend(lambda _: "    return 1\n"),
        out_dir=tmp_path / "out",
        max_tokens=99,
        limit=2,
        allow_code_execution=True,
    )
    rows = lines(samples_file(tmp_path / "out", "humaneval"))
    assert [row["task_id"] for row in rows] == ["HumanEval/0", "HumanEval/1"]
    for row in rows:
        assert set(row) == {"task_id", "solution"}
        assert row["solution"].rstrip().endswith('"""\n    return 1')
        compile(row["solution"], "program", "exec")


@pytest.mark.parametrize(("suite", "task"), [("mbpp_plus", "Mbpp/7"), ("mbpp", None), ("gsm8k", None)])
def test_tasks_are_called_as_evalplus_calls_them(tmp_path: Path, suite: str, task: str | None) -> None:
    part = Part(Suite(suite, "1", "code", ()), CHOICES)
    write_evalplus(tmp_path, part, [{"id": "7", "parsed": "x = 'ü'"}])
    file = samples_file(tmp_path, suite)
    assert file.exists() == (task is not None)
    assert task is None or lines(file) == [{"task_id": task, "solution": "x = 'ü'"}]
