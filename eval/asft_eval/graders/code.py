"""Programs that a model wrote, judged by their tests in the sandbox.

A program is loaded in one sandbox and its tests run in another; the tests call the program's functions over a socket. So
nothing that the program does to its own process (printing, exiting, patching) can make a verdict.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from asft_eval.errors import EvaluationError
from asft_eval.graders.code_text import Program, program_of
from asft_eval.sandbox import Limits, Sandbox, open_sandbox
from asft_eval.types import Example, Score

LIMITS = Limits()
_TESTS_LATER = 10.0  # seconds that the tests may take longer than the program
_VERDICT_BYTES = 1 << 20
_PACKAGES = (
    "numpy",
    "numpy.libs",
)  # what the tests of HumanEval+ and MBPP+ compare with, and programs import


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What an example's `answer` holds for this grader, as JSON.

    Attributes:
        prompt: the beginning of the program; empty where the model writes all of it.
        helpers: code that runs before the tests, for what they use of the prompt.
        tests: code that raises where the program is wrong.
        functions: names of the program that the tests call.
    """

    prompt: str
    helpers: str
    tests: str
    functions: tuple[str, ...]

    def to_answer(self) -> str:
        """The text for `Example.answer`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_answer(cls, answer: str) -> Problem:
        """Reads `to_answer`.

        Raises:
            EvaluationError: it is something else.
        """
        try:
            fields: dict[str, Any] = json.loads(answer)
            return cls(
                prompt=fields["prompt"],
                helpers=fields["helpers"],
                tests=fields["tests"],
                functions=tuple(fields["functions"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"the answer of a code example is no problem of prompt, helpers, tests and functions ({error!r})"
            ) from error


def grade_code(pairs: Sequence[tuple[Example, str]], *, workers: int | None = None) -> list[Score]:
    """The verdicts on (example, completion) pairs, in their order; equal programs of one example are run once.

    Args:
        pairs: examples whose answer is a `Problem`, and what the model wrote.
        workers: programs run at once; None means the cores of this machine.

    Raises:
        EvaluationError: this machine cannot contain a program.
    """
    problems = {example.answer: Problem.from_answer(example.answer) for example, _ in pairs}
    tasks: list[tuple[str, Program]] = []
    for example, text in pairs:
        problem = problems[example.answer]
        tasks.append((example.answer, program_of(text, prompt=problem.prompt, functions=problem.functions)))
    different = list({(answer, program.code): None for answer, program in tasks})
    cores = len(os.sched_getaffinity(0))
    with grading_sandbox() as (sandbox, search), ThreadPoolExecutor(workers or cores) as pool:

        def verdict(task: tuple[str, str]) -> tuple[bool, str]:
            return judge_program(sandbox, problems[task[0]], task[1], search=search)

        verdicts = pool.map(verdict, different)
        found = dict(zip(different, verdicts, strict=True))
    scores: list[Score] = []
    for answer, program in tasks:
        passed, reason = found[answer, program.code]
        scores.append(Score(passed, program.code, f"{reason} ({program.how})"))
    return scores


@contextmanager
def grading_sandbox() -> Generator[tuple[Sandbox, list[str]]]:
    """A sandbox in which numpy can be imported where it is installed, and the paths to search for it."""
    folders = [Path(entry, name) for entry in sys.path if entry for name in _PACKAGES]
    shown = [folder for folder in folders if folder.is_dir()]
    with open_sandbox(shown) as sandbox:
        yield sandbox, sorted({str(folder.parent) for folder in shown})


def judge_program(
    sandbox: Sandbox, problem: Problem, code: str, *, search: Sequence[str] = (), limits: Limits = LIMITS
) -> tuple[bool, str]:
    """Whether a program passes a problem's tests, and why.

    Args:
        sandbox: runs both.
        problem: the tests.
        code: the program.
        search: directories of packages.
        limits: of the program; the tests get a little more time.

    Raises:
        EvaluationError: this machine cannot contain a program.
    """
    patience = replace(
        limits, wall_seconds=limits.wall_seconds + _TESTS_LATER, cpu_seconds=limits.cpu_seconds + 5
    )
    here, there = socket.socketpair()
    reading, writing = os.pipe()
    payload = {"helpers": problem.helpers, "tests": problem.tests, "functions": list(problem.functions)}
    try:
        with (
            sandbox.start(
                "solution",
                {"code": code, "search": list(search)},
                limits=limits,
                descriptors=[there.fileno()],
            ) as solution,
            sandbox.start(
                "judge",
                {**payload, "search": list(search)},
                limits=patience,
                descriptors=[here.fileno(), writing],
            ) as tests,
        ):
            for end in (here, there):
                end.close()
            os.close(writing)
            writing = -1
            verdict = _read_verdict(reading, patience.wall_seconds + _TESTS_LATER)
            if verdict is None:
                return False, f"no verdict: in the tests, {tests.wait().reason}"
            if verdict["ended"]:
                return False, f"{verdict['reason']}: {solution.wait(1.0).reason}"
            return bool(verdict["passed"]), str(verdict["reason"])
    finally:
        here.close()
        there.close()
        os.close(reading)
        if writing >= 0:
            os.close(writing)


def _read_verdict(descriptor: int, seconds: float) -> dict[str, Any] | None:
    """The judge's line; None where it wrote none in time."""
    deadline, line = time.monotonic() + seconds, b""
    while not line.endswith(b"\n") and len(line) < _VERDICT_BYTES:
        ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
        part = os.read(descriptor, 1 << 16) if ready else b""
        if not part:
            return None
        line += part
    return json.loads(line)
