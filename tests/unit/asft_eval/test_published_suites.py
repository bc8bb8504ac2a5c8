"""The published suites on the real files, where they are; groups, prompt variants, and what is said where they are not."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from asft_eval import EvaluationError
from asft_eval.backends.fake import FakeBackend
from asft_eval.graders import grade
from asft_eval.run import evaluate
from asft_eval.suites import SUITES, load_suite, load_suites
from asft_eval.suites.prompts import PROMPTS, as_chat, render
from asft_eval.suites.published import hub_ids
from asft_eval.suites.questions import asked_by
from transformers import AutoTokenizer

HERE = ["math500", "gsm8k", "aime24", "medqa", "medmcqa", "mmlu_medical", "humaneval", "alpaca_eval"]
MEDICAL = ["medqa", "medmcqa", "mmlu_medical"]


@pytest.fixture
def real(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of real data as ASFT_DATA_DIR."""
    monkeypatch.setenv("ASFT_DATA_DIR", str(data_dir))
    return data_dir


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", HERE)
def test_every_suite_loads(real: Path, name: str):
    suite = load_suite(name)
    assert len(suite.examples) == SUITES[name].rows
    assert all(example.answer.strip() and example.question in example.prompt for example in suite.examples)


@pytest.mark.parametrize("name", MEDICAL)
def test_a_constant_a_scores_the_share_of_a(real: Path, model: Path, tmp_path: Path, name: str):
    rows = [json.loads(line) for line in (real / SUITES[name].file).read_text().splitlines()]
    rights = Counter(
        str(row["answer_idx" if name == "medqa" else "cop" if name == "medmcqa" else "answer"])
        for row in rows
    )
    result = evaluate(
        model,
        [name],
        backend=FakeBackend(lambda prompt: " A"),
        out_dir=tmp_path / "out",
        max_tokens=None,
    )
    assert result.suites[name].right == rights["A"] + rights["0"]
    assert result.suites[name].n == len(rows)


@pytest.mark.parametrize("name", MEDICAL)
def test_letters_against_themselves_and_shuffled(real: Path, name: str):
    examples = load_suite(name).examples
    own = grade("choice", [(example, f" {example.answer}") for example in examples])
    assert all(score.correct for score in own)
    letters = [example.answer for example in examples]
    moved = grade("choice", list(zip(examples, [*letters[1:], letters[0]], strict=True)))
    chance = sum((count / len(letters)) ** 2 for count in Counter(letters).values())
    share = sum(score.correct for score in moved) / len(moved)
    assert abs(share - chance) < 4 * (chance * (1 - chance) / len(letters)) ** 0.5


def test_the_medical_form(real: Path):
    prompt = load_suite("mmlu_medical").examples[0].prompt
    lines = prompt.split("\n")
    assert lines[0].startswith("Question: A lesion causing compression")
    assert [line[:3] for line in lines[1:]] == ["", "Opt", "A. ", "B. ", "C. ", "D. ", "", "Ans"]
    assert prompt.endswith("\n\nAnswer:")


def test_variants_change_the_prompt_and_the_hash(real: Path):
    plain = load_suite("aime24")
    assert plain.examples[0].prompt.endswith("### Response:")
    hashes = {load_suite("aime24", prompt=variant).sha256 for variant in PROMPTS}
    assert len(hashes) == len(PROMPTS)
    assert load_suite("aime24", prompt="alpaca").sha256 == plain.sha256
    assert load_suites(["aime24", "medqa"], prompt="chat")[1].prompt == "raw"
    with pytest.raises(EvaluationError, match="leave the prompt variant chat out"):
        load_suites(["medqa"], prompt="chat")


def test_alpaca_is_the_training_text():
    from asft_nemo.data.templates import alpaca_prompt

    question = "Braces {question} and {instruction} stay."
    assert render("alpaca", question) == alpaca_prompt(question)
    assert render("alpaca_newline", question) == alpaca_prompt(question) + "\n"
    with pytest.raises(EvaluationError, match="choose one of alpaca"):
        render("alpacca", question)


def test_groups_and_repeats(real: Path):
    assert [suite.name for suite in load_suites(["medqa", "medical", "instruct"])] == [
        *MEDICAL,
        "alpaca_eval",
    ]


def test_a_suite_may_be_named_by_its_id_on_the_hub(real: Path):
    names = ["HuggingFaceH4/MATH-500", "math500", " openai/gsm8k"]
    assert [suite.name for suite in load_suites(names)] == ["math500", "gsm8k"]
    assert load_suite("tatsu-lab/alpaca_eval").name == "alpaca_eval"
    assert list(asked_by(["openai/openai_humaneval"])) == ["humaneval"]
    assert set(hub_ids().values()) <= set(SUITES)


def test_a_suite_that_is_not_here_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASFT_DATA_DIR", str(tmp_path))
    for name, says in (
        ("gsm8k", "asft data download gsm8k"),
        ("mmlu_medical", "asft data download mmlu "),
        ("minerva", "math/minerva_test.jsonl into the folder"),
        ("gsm9k", "there is no suite or file gsm9k"),
    ):
        with pytest.raises(EvaluationError, match=says):
            load_suite(name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"question": "a", "answer": "no mark"}\n', "row 1 .*no ####"),
        ('{"question": "a"}\n', "row 1 .*KeyError"),
        ('{"question": "a", "answer": "#### 1"}\n', "has 1 rows and gsm8k has 1319"),
        ('{"question": ', "cannot be read"),
    ],
)
def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, says: str):
    monkeypatch.setenv("ASFT_DATA_DIR", str(tmp_path))
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "gsm8k_test.jsonl").write_text(content)
    with pytest.raises(EvaluationError, match=says):
        load_suite("gsm8k")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("math500", {"unique_id": "7", "problem": "Is it so?", "answer": True}),
        ("aime25", {"problem": "Is it so?", "answer": True}),
        ("amc23", {"question": "Is it so?", "answer": True}),
        ("minerva", {"problem": "Is it so?", "answer": True}),
        ("olympiadbench", {"question": "Is it so?", "final_answer": [True]}),
        ("mmlu_medical", {"question": "Is it so?", "choices": ["a", "b", "c", "d"], "answer": True}),
    ],
)
def test_a_truth_value_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, row: dict[str, object]
):
    """Python would have written it as True, or taken it for the number 1."""
    monkeypatch.setenv("ASFT_DATA_DIR", str(tmp_path))
    file = tmp_path / SUITES[name].file
    file.parent.mkdir()
    file.write_text(json.dumps(row))
    said = rf"row 1 of .*{file.name} is no row of {name} .*(the answer is true, neither a text nor a number|right option is True)"
    with pytest.raises(EvaluationError, match=said):
        load_suite(name)


@pytest.mark.parametrize(
    ("name", "row", "answer"),
    [
        ("minerva", {"problem": "p", "solution": r"so \boxed{3} then \boxed{4.5e14}"}, "4.5e14"),
        ("olympiadbench", {"id": 7, "question": "p", "final_answer": ["$2$"]}, "$2$"),
        ("amc23", {"id": 0, "question": "p", "answer": 27.0}, "27"),
        ("aime25", {"id": "3", "problem": "p", "answer": "70"}, "70"),
    ],
)
def test_rows_of_suites_that_are_rarely_here(name: str, row: dict[str, object], answer: str):
    asked = SUITES[name].read(row)
    assert (asked.question, asked.answer) == ("p", answer)


PAGE = Path(__file__).resolve().parents[3] / "eval" / "asft_eval" / "suites" / "README.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="no README here: not a clone")
def test_the_page_has_every_suite_of_the_table():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and "`" in line and line.count("|") == 7
    ]
    found = {
        cells[1].strip("`"): (
            cells[0],
            cells[2].split(",")[0],
            cells[3].split(" ")[0],
            cells[4].strip("`"),
            cells[5].split()[-1],
        )
        for cells in rows
    }
    assert all(f"`{name}`" in PAGE.read_text(encoding="utf-8") for name in hub_ids())
    absent = "none: put it there"
    assert found == {
        name: (suite.group, str(suite.rows), suite.file, suite.download or absent, suite.grader)
        for name, suite in SUITES.items()
    }


def test_a_chat_puts_the_begin_token_in_once(model_dir: Path, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_dir.glob("tokenizer*"):
        shutil.copy(file, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings["chat_template"] = "{{ bos_token or '' }}USER {{ messages[0]['content'] }} MODEL"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (prompt,) = as_chat(folder, ["1+1?"])
    assert prompt.endswith("USER 1+1? MODEL")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.bos_token_id is not None:
        assert tokenizer(prompt)["input_ids"].count(tokenizer.bos_token_id) == 1
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(EvaluationError, match="no chat template"):
        as_chat(folder, ["a"])
