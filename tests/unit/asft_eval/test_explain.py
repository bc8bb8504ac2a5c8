"""`asft eval explain RESULT ID`: for every grader, and every step of the mathematical one, the command says what decided."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from asft_eval import EvaluationError
from asft_eval.backends.fake import FakeBackend
from asft_eval.explain import explain
from asft_eval.graders import code as grader
from asft_eval.graders import math_judge
from asft_eval.graders.code import Problem
from asft_eval.run import evaluate
from asft_eval.sandbox import open_sandbox
from asft_eval.types import Example, Suite

from asft_nemo import cli

Explain = Callable[[str], str]


@pytest.fixture
def explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Explain]:
    """Evaluates a suite with completions by id; gives what the command prints for an id."""

    def make(suite: Suite, texts: dict[str, str] | Callable[[str], str], **settings: object) -> Explain:
        (tmp_path / "model").mkdir()
        backend = FakeBackend(texts.__getitem__ if isinstance(texts, dict) else texts)
        more = {"backend": backend, "out_dir": tmp_path / "out", "max_tokens": 100_000, **settings}
        evaluate(tmp_path / "model", [suite], **more)  # type: ignore[arg-type]
        return functools.partial(command, tmp_path / "out", capsys)

    return make


def command(folder: Path, capsys: pytest.CaptureFixture[str], example: str) -> str:
    """What the command prints; of a refusal its sentence."""
    capsys.readouterr()
    code = cli.main(["eval", "explain", str(folder), example])
    said = capsys.readouterr()
    assert code == (2 if said.err else 0)
    return said.err or said.out


#: reason -> gold and completion that it decides; every text that `math_judge` and `math_text` may give is here
STEPS = {
    "last box: the same text": ("x+1", r"$\boxed{x+1}$"),
    "after ####: the same text": ("7", "#### 7"),
    "after 'answer': the same number": ("7", "The answer is 7.0."),
    "last formula: the same number": ("0.5", r"Hence \[ \frac12 \]"),
    "last number: another number": ("7", "It may be 8 then"),
    "whole text: the same text": (r"\text{Evelyn}", "Evelyn"),
    "no answer found": ("7", "I cannot solve this problem with what is given to me here."),
    "empty completion": ("7", " "),
    "last box: the same text but for unit, name or thousands": ("1234", r"\boxed{x = 1,234}"),
    "last box: in m instead of cm": (r"5\text{ cm}", r"\boxed{5\text{ m}}"),
    "last box: the same number, once in per cent": (r"50\%", r"\boxed{0.5}"),
    "last box: the same letter": (r"\text{(C)}", r"\boxed{\textbf{(C)}\ 12}"),
    "last box: another letter": (r"\text{(C)}", r"\boxed{B}"),
    "last box: the same digits": ("4210_{5}", r"\boxed{4210}"),
    "last box: other digits": ("4210_{5}", r"\boxed{4211_5}"),
    "last box: another base": ("4210_{5}", r"\boxed{4210_6}"),
    "last box: part by part in order": ("(1,\\frac{1}{2})", r"\boxed{(1,0.5)}"),
    "last box: part by part in any order": ("1,2", r"\boxed{2,1}"),
    "last box: a part differs": ("(1,2)", r"\boxed{(2,1)}"),
    "last box: 1 parts instead of 2": (r"\{1,2\}", r"\boxed{\{1\}}"),
    "last box: brackets () instead of []": ("[0,1]", r"\boxed{(0,1)}"),
    "last box: brackets {} instead of ()": ("(0,1)", r"\boxed{\{0,1\}}"),
    "last box: equal by math-verify": ("x^2-1", r"\boxed{(x-1)(x+1)}"),
    "last box: not equal by math-verify": ("x^2-1", r"\boxed{(x-1)^2}"),
    "last box: equations whose sides differ by a factor": ("2x = 10", r"\boxed{x = 5}"),
    "whole text: different": ("7", "."),
    "last box: an answer of 500 characters is none": ("7", r"\boxed{" + "1" * 500 + "}"),
    "last box: not decided within 1 s": ("42", r"\boxed{9^{9^{9^{9}}}}"),
}  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="no math-verify")
def test_mathematics_every_step(explained: Callable[..., Explain], monkeypatch: pytest.MonkeyPatch):
    from asft_eval.graders import math_pool

    quickly = functools.partial(math_pool.grade_math, seconds=1.0, processes=1)
    monkeypatch.setattr(math_pool, "grade_math", quickly)
    rows = {str(i): row for i, row in enumerate(STEPS.items())}
    examples = tuple(Example(i, i, gold) for i, (_, (gold, _)) in rows.items())
    tell = explained(Suite("sums", "1", "math", examples), {i: text for i, (_, (_, text)) in rows.items()})
    wrong = [(i, reason) for i, (reason, _) in rows.items() if f"\nwhy: {reason}\n" not in tell(i)]
    assert wrong == []


def test_no_step_is_left_out():
    """Verdicts are written as pairs of a constant and a text: each must be among `STEPS`."""
    tree = ast.parse(Path(math_judge.__file__).read_text(encoding="utf-8"))
    pairs = [node.elts for node in ast.walk(tree) if isinstance(node, ast.Tuple) and len(node.elts) == 2]
    texts = [
        second for first, second in pairs if isinstance(first, ast.Constant) and isinstance(first.value, bool)
    ]
    steps = {"".join(_parts(text)) for text in texts}
    assert len(steps) > 15
    absent = [step for step in steps if not any(re.search(f": {step}$", reason) for reason in STEPS)]
    assert absent == []


def _parts(text: ast.expr) -> list[str]:
    pieces = text.values if isinstance(text, ast.JoinedStr) else [text]
    return [re.escape(str(piece.value)) if isinstance(piece, ast.Constant) else ".+" for piece in pieces]


def test_choices_show_their_log_probabilities(explained: Callable[..., Explain]):
    examples = (Example("right", "a", "B"), Example("wrong", "b", "C"))
    suite = Suite("letters", "1", "choice", examples, choices=(" A", " B", " C", " D"))
    tell = explained(suite, {"a": " B", "b": " D"})
    assert "completion 1: right" in tell("right")
    said = tell("letters:wrong")
    for part in ("right answer: C", "completion 1: wrong", "read as the answer: D", "why: D is the most probable choice, right is C"):  # fmt: skip
        assert part in said
    assert "log probabilities of the choices: -inf -inf -inf 0.000" in said


PROGRAMS = {
    "assertion": ("def one():\n    return 2\n", "one(): returned 2, failed: assert one() == 1"),
    "endless": ("def one():\n    while True:\n        pass\n", "passed its (limit of processor time|time limit)"),
    "allocating": ("def one():\n    return len(bytearray(10 ** 10))\n", "one(): MemoryError"),
    "many": (
        "import os, time\ndef one():\n    for _ in range(4):\n        if os.fork() == 0:\n            break\n"
        "    x = bytearray(b'1') * (100 << 20)\n    time.sleep(60)\n",
        "one(): it ended: the program passed its memory limit",
    ),
    "right": ("def one():\n    return 1\n", "all tests passed (1 calls)"),
}  # fmt: skip


def test_programs_say_what_failed(explained: Callable[..., Explain], monkeypatch: pytest.MonkeyPatch):
    try:
        open_sandbox().close()
    except EvaluationError as error:
        pytest.skip(str(error))
    tight = replace(grader.LIMITS, cpu_seconds=2, memory_bytes=256 << 20)
    monkeypatch.setattr(grader, "judge_program", functools.partial(grader.judge_program, limits=tight))
    problem = Problem(prompt="", helpers="", tests="assert one() == 1\n", functions=("one",)).to_answer()
    suite = Suite("own", "1", "code", tuple(Example(name, name, problem) for name in PROGRAMS))
    texts = {name: code for name, (code, _) in PROGRAMS.items()}
    tell = explained(suite, texts, allow_code_execution=True)
    for name, (code, reason) in PROGRAMS.items():
        said = tell(name)
        why = next(line for line in said.splitlines() if line.startswith("why: "))
        assert re.search(reason if name == "endless" else re.escape(reason), why), why
        assert why.endswith("(a whole program)")
        assert ("completion 1: right" in said) == (name == "right")
        assert code in said


def test_exact_matches(explained: Callable[..., Explain]):
    examples = tuple(Example(x, x, "AB") for x in ("same", "other", "none"))
    tell = explained(
        Suite("words", "1", "exact_match", examples), {"same": " AB\n", "other": "AC", "none": ""}
    )
    assert "why: equal" in tell("same")
    assert "why: different" in tell("other")
    said = tell("none")
    assert "read as the answer: nothing" in said
    assert "why: empty completion" in said


def test_answers_that_await_a_judge(explained: Callable[..., Explain]):
    suite = Suite("alpaca_eval", "2", "judge", (Example("helpful/1", "Say hello.", "Hello!"),))
    said = explained(suite, lambda prompt: "Hi.")("helpful/1")
    assert "completion 1: not judged" in said
    assert "right answer: Hello!" in said


def test_every_completion_of_an_example_and_no_other(explained: Callable[..., Explain]):
    drawn = iter("ABAB" * 8)
    suite = Suite("words", "1", "exact_match", (Example("1", "a", "A"), Example("2", "b", "B")))
    said = explained(suite, lambda prompt: next(drawn), protocol="paper")("2")
    assert re.findall(r"^## completion (\d+)", said, re.MULTILINE) == [str(i) for i in range(1, 17)]
    assert said.count("# words@paper, example 2") == 1
    assert (said.count(": right"), said.count(": wrong")) == (8, 8)


def test_of_an_unknown_id_the_nearest_are_named(explained: Callable[..., Explain], tmp_path: Path):
    ids = ["test/algebra/305.json", "test/algebra/35.json", "test/geometry/9.json", "train/x"]
    suite = Suite("math500", "1", "exact_match", tuple(Example(x, x, "1") for x in ids))
    tell = explained(suite, lambda prompt: "1")
    said = tell("test/algebra/306.json")
    assert said.count("\n") == 1
    assert (
        "has no example test/algebra/306.json: the nearest are math500:test/algebra/305.json, math500:"
        in said
    )
    assert "geometry" in tell("math500:test/geometri/9.json")
    assert "its ids look like math500:test/algebra/305.json, math500:test/algebra/35.json" in tell("!")
    with pytest.raises(EvaluationError, match="nowhere"):
        explain(tmp_path / "nowhere", "1")


def test_of_two_suites_one_is_graded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What is graded is told; what is not says so, in whichever order they stand."""
    (tmp_path / "model").mkdir()
    suites = [Suite(name, "1", "exact_match", (Example("1", "a", "A"),)) for name in ("one", "two")]
    evaluate(
        tmp_path / "model", suites, backend=FakeBackend(str.upper), out_dir=tmp_path / "out", max_tokens=9
    )
    file = tmp_path / "out" / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[1:]:
        del row["correct"], row["parsed"], row["reason"]
    for order in (rows, rows[::-1]):
        file.write_text("".join(json.dumps(row) + "\n" for row in order))
        said = command(tmp_path / "out", capsys, "1")
        assert said.startswith("# one, example 1\n")
        assert "completion 1: right" in said
        assert said.endswith(
            "# two, example 1\n\nnot graded yet: evaluate with this directory as --out again\n"
        )
        assert "not graded yet" not in command(tmp_path / "out", capsys, "one:1")
        assert "is not finished: evaluate with this directory as --out again\n" in command(
            tmp_path / "out", capsys, "two:1"
        )
        said = command(tmp_path / "out", capsys, "7")
        assert (
            "is not finished: evaluate with this directory as --out again; so far it has no example 7: its ids"
            in said
        )
    (tmp_path / "out" / "results.json").unlink()
    file.write_text("")
    assert "is not finished" in command(tmp_path / "out", capsys, "1")


def test_json_for_programs(
    explained: Callable[..., Explain], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    explained(Suite("words", "1", "exact_match", (Example("1", "a", "A"),)), lambda prompt: "A")
    assert cli.main(["eval", "explain", str(tmp_path / "out"), "1", "--json"]) == 0
    assert "why: equal" in json.loads(capsys.readouterr().out)["explanation"]
