"""HumanEval and MBPP: what is read out of a completion, values between sandboxes, and the real suite against itself."""

from __future__ import annotations

import functools
import gzip
import json
import math
from collections import Counter, OrderedDict, deque
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from asft_eval import EvaluationError, Example
from asft_eval.backends.fake import FakeBackend
from asft_eval.graders import code as grader
from asft_eval.graders import grade
from asft_eval.graders.code import Problem, grade_code
from asft_eval.graders.code_text import program_of
from asft_eval.run import evaluate
from asft_eval.sandbox import open_sandbox
from asft_eval.sandbox.wire import BrokenChannelError, Opaque, decode, encode
from asft_eval.suites import load_suites
from asft_eval.suites.code import called_names, humaneval, mbpp
from asft_eval.types import Suite
from hypothesis import given
from hypothesis import strategies as st

PROMPT = (
    'import math\n\n\ndef helper(x):\n    return x\n\n\ndef area(r):\n    """Area of a circle.\n    """\n'
)
BODY = "    return math.pi * r * r\n"
WHOLE = "def area(r):\n    return math.pi * r * r\n"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here is about time limits, and a busy machine is slow: importing numpy alone may take it seconds."""
    roomy = replace(grader.LIMITS, wall_seconds=120.0, cpu_seconds=60)
    monkeypatch.setattr(grader, "judge_program", functools.partial(grader.judge_program, limits=roomy))


@pytest.fixture
def contained() -> None:
    try:
        open_sandbox().close()
    except EvaluationError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("completion", "how"),
    [
        (BODY, "continues the prompt"),
        (BODY + "\n\ndef other():\n    return 1 +\n", "continues the prompt"),
        (BODY + "\n# Test\nprint(area(2))", "continues the prompt"),
        (BODY + "\nif __name__ == '__main__':\n    area(", "continues the prompt"),
        (BODY + "```\nThis function computes the area.", "continues the prompt"),
        ("\n\n" + BODY, "continues the prompt"),
        ("    # times pi\n" + BODY, "continues the prompt"),
        ("    import math\n" + BODY.replace("\n", "\r\n"), "continues the prompt"),
        (WHOLE, "a whole program"),
        ("import math\n" + WHOLE + "\nprint(area(1))\n", "a whole program"),
        ("Here is the function:\n" + WHOLE, "a whole program"),
        ("Here it is:\n\n" + WHOLE + "\nIt multiplies pi by the square.\n", "a whole program"),
        (f"Sure!\n```python\n{WHOLE}```\nDone.", "fenced block 1 of 1: a whole program"),
        (
            f"```\npip install nothing\n```\nthen\n```py\n{WHOLE}```",
            "fenced block 2 of 2: a whole program",
        ),
        (f"```python\n{WHOLE}", "fenced block 1 of 1: a whole program"),
        (f"1. Step\n   ```python\n   {WHOLE.replace(chr(10), chr(10) + '   ')}```", "fenced block 1 of 1: a whole program"),
        (f"```python\n{BODY}```", "fenced block 1 of 1: continues the prompt"),
        ("return math.pi * r * r", "a function body, indented"),
        ("square = r * r\n    return math.pi * square\n", "a function body, indented"),
        ("square = r * r\nif r:\n    square += 0\nreturn math.pi * square\n", "a function body, indented"),
        ("return math.pi * r * r\n\nThis is the area.\n", "a function body, indented"),
        ("area = lambda r: math.pi * r * r\n", "a whole program"),
        ("    def area(r):\n        return math.pi * r * r\n", "a whole program"),
        ("def helper(x):\n    return x * x\n\n" + "def area(r):\n    return math.pi * helper(r)\n", "a whole program"),
    ],
)  # fmt: skip
def test_completions_that_stand_for_the_right_program(completion: str, how: str):
    program = program_of(completion, prompt=PROMPT, functions=["area"])
    names: dict[str, object] = {}
    exec(program.code, names)
    assert names["area"](2) == pytest.approx(4 * math.pi)  # type: ignore[operator]
    assert program.how == how


@pytest.mark.parametrize(
    ("completion", "how"),
    [
        ("", "empty completion"),
        ("  \n", "empty completion"),
        ("I cannot help with that.", "a function body, indented"),
        ("    return math.pi *", "continues the prompt"),
        ("\x00", "a function body, indented"),
        ("def area(r):\n    return (", "a whole program"),
        ("return (" * 10_000, "a function body, indented"),
        ("(" * 100_000, "a function body, indented"),
        ("x = 1\n" * 200_000, "a function body, indented"),
    ],
)
def test_completions_without_a_program(completion: str, how: str):
    program = program_of(completion, prompt=PROMPT, functions=["area"])
    assert program.how == how
    assert len(program.code) < 2_000_000


def test_a_whole_program_was_asked_for():
    wrapped = f"Of course:\n```python\n{WHOLE}```"
    assert program_of(wrapped, prompt="", functions=["area"]).code == WHOLE + "\n"
    other = program_of("def volume(r):\n    return r\n", prompt="", functions=["area"])
    assert other.how == "a program without area"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.fractions() | st.decimals(allow_nan=False) | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.integers() | st.text(), inner),
    max_leaves=20,
)  # fmt: skip


@given(PLAIN)
def test_plain_values_cross_unchanged(value: object):
    there = decode(json.loads(json.dumps(encode(value))))
    assert there == value
    assert type(there) is type(value)


def test_other_values_cross_as_what_they_equal():
    for value, arrives in [
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
        ({1: 2}.keys(), {1}),
        (deque([1]), deque([1])),
        (frozenset([(1, 2)]), frozenset([(1, 2)])),
        (range(3), range(3)),
        (Fraction(1, 3), Fraction(1, 3)),
        (Decimal("0.1"), Decimal("0.1")),
        (10**5000, 10**5000),
        (pytest.importorskip("numpy").int64(3), 3),
    ]:
        assert decode(json.loads(json.dumps(encode(value)))) == arrives
    assert list(decode(encode(x for x in (1, 2)))) == [1, 2]
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan)))))
    nested: list[object] = []
    nested.append(nested)
    for value in (object(), len, nested, ValueError):
        assert isinstance(decode(encode(value)), Opaque)


@pytest.mark.parametrize(
    "value", [{}, {"a": 1, "b": 2}, {"nothing": 1}, {"int": "x"}, {"set": [[]]}, {"range": "ab"}]
)
def test_forged_values_are_refused(value: object):
    with pytest.raises(BrokenChannelError):
        decode(value)


def test_a_row_of_mbpp(contained: None):
    row = {
        "task_id": 7,
        "text": "Write a function to square all numbers.",
        "code": "def squares(xs):\n    return [x * x for x in xs]\n",
        "test_setup_code": "import math",
        "test_list": ["assert squares([1, 2]) == [1, 4]", "assert math.fsum(squares([3])) == 9"],
    }
    asked = mbpp(row)
    assert (
        asked.question
        == '"""\nWrite a function to square all numbers.\nassert squares([1, 2]) == [1, 4]\n"""\n'
    )
    assert Problem.from_answer(asked.answer).functions == ("squares",)
    example = Example(asked.id, asked.question, asked.answer)
    texts = [row["code"], f"```python\n{row['code']}```", "def squares(xs):\n    return xs\n", "no"]
    scores = grade_code([(example, str(text)) for text in texts])
    assert [score.correct for score in scores] == [True, True, False, False]
    assert scores[2].reason.startswith("squares([1, 2]): returned [1, 2], failed: assert squares([1, 2])")


def test_tests_of_the_plus_sets_run_with_numpy(contained: None):
    pytest.importorskip("numpy")
    test = (
        "import numpy as np\n\ndef assertion(out, exp, atol):\n    assert np.allclose(out, exp, rtol=1e-7, atol=atol)\n\n"
        "def check(candidate):\n    for inp, exp in zip([[1.0], [2.0]], [3.14159265358979, 12.5663706143592]):\n"
        "        assertion(candidate(*inp), exp, 1e-6)\n"
    )
    row = {"task_id": "HumanEval/x", "prompt": PROMPT, "entry_point": "area", "test": test}
    asked = humaneval(row)
    example = Example(asked.id, asked.question, asked.answer)
    right, wrong = grade_code([(example, BODY), (example, "    return 3.14 * r * r\n")])
    assert right.correct, right.reason
    assert not wrong.correct


def test_names_that_tests_call():
    assert called_names("import math\nx = f(1)\nassert g(x) == math.pi and len([y for y in x])") == ("f", "g")
    for tests in ("assert 1 ==", "assert 1 == 1"):
        with pytest.raises(ValueError, match="tests"):
            called_names(tests)


def test_a_damaged_problem():
    with pytest.raises(EvaluationError, match="no problem"):
        grade("code", [(Example("1", "", "{}"), "x")], allow_code_execution=True)


def test_evaluation_asks_first_and_goes_on_after_hostile_programs(tmp_path: Path, contained: None):
    tests = Problem(prompt="", helpers="", tests="assert one() == 1\n", functions=("one",)).to_answer()
    programs = {
        "a": "def one():\n    return 1\n",
        "b": "import os\nos._exit(0)\n",
        "c": "def one():\n    return 1\n\n",
    }
    suite = Suite("own", "1", "code", tuple(Example(name, name, tests) for name in programs))
    (tmp_path / "model").mkdir()
    backend = FakeBackend(programs.__getitem__)
    settings = {"backend": backend, "out_dir": tmp_path / "out", "max_tokens": 1000}
    with pytest.raises(EvaluationError, match=r"suite own runs programs .* --allow-code-execution"):
        evaluate(tmp_path / "model", [suite], **settings)  # type: ignore[arg-type]
    assert not backend.asked
    result = evaluate(tmp_path / "model", [suite], allow_code_execution=True, **settings)  # type: ignore[arg-type]
    assert result.suites["own"].right == 2
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert rows[1]["reason"] == (
        "while loading: it ended: the program exited with status 0 (a program without one)"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        pytest.param(slice(4, None, 8), slice(0, None, 33), id="some"),
        pytest.param(slice(None), slice(None), id="all", marks=pytest.mark.long),
    ],
)
def test_humaneval_against_itself(
    right: slice, wrong: slice, data_dir: Path, monkeypatch: pytest.MonkeyPatch, contained: None
):
    """Canonical solutions pass; with their bodies removed none does."""
    monkeypatch.setenv("ASFT_DATA_DIR", str(data_dir))
    (suite,) = load_suites(["humaneval"])
    with gzip.open(data_dir / "code" / "HumanEval.jsonl.gz", "rt") as file:
        solutions = [json.loads(line)["canonical_solution"] for line in file]
    assert len(suite.examples) == 164
    answered = list(zip(suite.examples, solutions, strict=True))[right]
    empty = [(example, "    pass\n") for example in suite.examples[wrong]]
    scores = grade_code([*answered, *empty])
    assert [s.reason for s in scores[: len(answered)] if not s.correct] == []
    assert sum(s.correct for s in scores[len(answered) :]) == 0
