"""Evaluation questions in training data are found, and little else."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from asft_eval.suites.published import SUITES
from asft_eval.suites.questions import questions

from asft_nemo import cli
from asft_nemo.data.contamination import GRAM, EvaluationIndex, found_in
from asft_nemo.data.records import Conversation
from asft_nemo.data.sources import Record

LONG = "A farmer has 17 sheep and all but 9 of them run away through the open gate on a cold morning"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (LONG, True),
        (f"Solve this.\n\n{LONG.upper()}!", True),
        (LONG.replace("sheep", "goats").replace("gate", "door"), False),
        (" ".join(LONG.split()[2 : 2 + GRAM]), True),
        (" ".join(LONG.split()[2 : 1 + GRAM]), False),
        ("what is 2+2", True),
        ("What is 2 + 2?", True),
        ("What is 2 + 2, and why?", False),
        ("ｗｈａｔ is 2+2", True),
        ("", False),
        ("?!", False),
    ],
)
def test_what_counts_as_the_same(text: str, found: bool) -> None:
    index = EvaluationIndex({"one": [LONG], "two": ["", "What is 2+2?"]})
    assert (index.find(text) is not None) == found


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("Question: What is 2+2?\n\nOptions:\nA. 3\nB. 4\n\nAnswer:", True),
        ("Question: What is\n2+2?\n\nOptions:\nA. 3", True),
        ("Answer briefly.\nQ: what is 2 + 2\nA:", True),
        ("What is 2+2?\nAnswer with a number.", False),  # four words and no label: too little to tell
        ("Which organ makes bile at night?\nAnswer in a word.", True),
        ("Question: What is 2+3?\n\nOptions:\nA. 3", False),
        ("Question: \n\nOptions:", False),
    ],
)
def test_short_questions_inside_a_prompt(prompt: str, found: bool) -> None:
    index = EvaluationIndex({"one": ["What is 2+2?", "Which organ makes bile at night?"]})
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": "4"})
    assert (found_in(Record(Conversation(turns), "f", 1, 0), index) is not None) == found
    answer = ({"role": "user", "content": "Go on."}, {"role": "assistant", "content": prompt})
    assert found_in(Record(Conversation(answer), "f", 1, 0), index) is None


@pytest.mark.parametrize("suite", ["medmcqa", "medqa", "math500"])
def test_a_suites_own_rows_are_found_and_no_others(
    suite: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every question of a suite, as a row of training data asks it; and GSM8K's training rows, which no such suite asks."""
    monkeypatch.setenv("ASFT_DATA_DIR", str(data_dir))
    asked = questions(suite)
    index = EvaluationIndex({suite: asked})
    frame = "Question: {}\n\nOptions:\nA. yes\nB. no\n\nAnswer:"

    def holds(prompt: str) -> bool:
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": "A"})
        return found_in(Record(Conversation(turns), "f", 1, 0), index) is not None

    assert [text for text in asked if not holds(frame.format(text))] == []
    rows = (data_dir / "math" / "gsm8k_train.jsonl").read_text().splitlines()[:2000]
    assert sum(holds(json.loads(row)["question"]) for row in rows) <= 20


def write(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_command_names_row_and_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = write(tmp_path / "suite.jsonl", [{"prompt": "other"}, {"prompt": LONG}])
    rows = [{"question": "fine", "answer": "yes"}, {"question": f"Hear: {LONG}", "answer": "9"}]
    train = write(tmp_path / "train.jsonl", rows)
    assert cli.main(["data", "check", str(train), "--against", str(suite)]) == 0
    captured = capsys.readouterr()
    assert f"1 rows hold a question of {suite}" in captured.out
    assert f"{train}:2: shares 13 words in a row with row 2 of {suite}" in captured.err
    assert cli.main(["data", "check", str(train), "--json", "--against", str(suite)]) == 0
    (found,) = json.loads(capsys.readouterr().out)["contaminated_rows"]
    assert (found["line"], found["row"]) == (2, 2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no suite"),
        ('{"question": "x"}\n', "has a row without the text 'prompt'"),
        ('{"prompt": 3}\n', "has a row without the text 'prompt'"),
        ("not json\n", "cannot be read"),
        ("", "has no row"),
    ],
)
def test_a_suite_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    train = write(tmp_path / "train.jsonl", [{"question": "fine", "answer": "yes"}])
    if content is not None:
        (tmp_path / "suite.jsonl").write_text(content)
    assert cli.main(["data", "check", str(train), "--against", str(tmp_path / "suite.jsonl")]) == 2
    assert said in capsys.readouterr().err


def test_a_suite_by_name_needs_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ASFT_DATA_DIR", raising=False)
    train = write(tmp_path / "train.jsonl", [{"question": "fine", "answer": "yes"}])
    assert cli.main(["data", "check", str(train), "--against", "math500"]) == 2
    assert "run `asft data download math500 --out DIR` and set ASFT_DATA_DIR=DIR" in capsys.readouterr().err


def test_a_group_is_its_suites_whichever_the_table_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every suite of the group is asked of a file made for it: one question is in the training rows."""
    monkeypatch.setenv("ASFT_DATA_DIR", str(tmp_path))
    (tmp_path / "code").mkdir()
    suites = {name: suite for name, suite in SUITES.items() if suite.group == "code"}
    for name, suite in suites.items():
        text = json.dumps({suite.field: f"a question of {name}"}) + "\n"
        packed = gzip.compress(text.encode()) if suite.file.endswith(".gz") else text.encode()
        (tmp_path / suite.file).write_bytes(packed)
    rows = [{"question": f"a question of {name}", "answer": "x"} for name in suites]
    train = write(tmp_path / "train.jsonl", [*rows, {"question": "another", "answer": "y"}])
    assert cli.main(["data", "check", str(train), "--json", "--against", "code"]) == 0
    found = json.loads(capsys.readouterr().out)["contaminated_rows"]
    assert [(row["line"], row["suite"]) for row in found] == list(enumerate(suites, start=1))


def test_planted_problems_are_found_among_real_ones(
    tmp_path: Path,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """20 problems of MATH-500 among GSM8K's training rows: all found, and at most 1 % of the others."""
    monkeypatch.setenv("ASFT_DATA_DIR", str(data_dir))
    rows = [json.loads(line) for line in (data_dir / "math" / "gsm8k_train.jsonl").read_text().splitlines()]
    problems = [
        json.loads(line) for line in (data_dir / "math" / "math500_test.jsonl").read_text().splitlines()
    ]
    chance = random.Random(0)
    planted = set()
    for problem in chance.sample(problems, 20):
        place = chance.randrange(len(rows))
        rows.insert(place, {"question": problem["problem"], "answer": problem["answer"]})
        planted = {line + (line > place) for line in planted} | {place + 1}
    train = write(tmp_path / "train.jsonl", rows)
    assert cli.main(["data", "check", str(train), "--json", "--against", "math500"]) == 0
    found = {row["line"] for row in json.loads(capsys.readouterr().out)["contaminated_rows"]}
    assert planted <= found
    assert len(found - planted) <= 0.01 * len(rows)
    print(f"{len(planted)} planted, {len(found)} found in {len(rows)} rows")


@pytest.mark.parametrize(
    "suite", ["math500", "gsm8k", "aime24", "medqa", "medmcqa", "mmlu_medical", "humaneval", "alpaca_eval"]
)
def test_every_suite_has_its_questions(data_dir: Path, monkeypatch: pytest.MonkeyPatch, suite: str) -> None:
    monkeypatch.setenv("ASFT_DATA_DIR", str(data_dir))
    sizes = {"math500": 500, "gsm8k": 1319, "aime24": 30, "medqa": 1273, "medmcqa": 4183}
    sizes |= {"mmlu_medical": 2739, "humaneval": 164, "alpaca_eval": 805}
    assert len(questions(suite)) == sizes[suite]
