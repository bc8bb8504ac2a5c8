"""What the tests of the sandbox share: a small problem, questions to the inside, a look at the processes outside."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from asft_eval.graders.code import LIMITS, Problem
from asft_eval.sandbox import Outcome, Sandbox

TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0\n"
PROBLEM = Problem(prompt="", helpers="", tests=TESTS, functions=("add",))
RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a - b\n"
# For what ends by itself: a busy machine may take its time.
PATIENT = replace(LIMITS, memory_bytes=512 << 20)
QUICK = replace(PATIENT, wall_seconds=2.0, cpu_seconds=1)


def finds(sandbox: Sandbox, expression: str, prepare: str = "") -> bool:
    """Whether an expression is true in the sandbox."""
    # with time to spare: what is looked for here is no limit, and a busy machine is slow
    outcome = sandbox.run(f"import os, sys\n{prepare}\nsys.exit(7 if {expression} else 8)\n", limits=LIMITS)
    assert outcome in (Outcome("exit", 7), Outcome("exit", 8)), outcome
    return outcome.number == 7


def seen(name: str, wanted: bool = True) -> bool:
    """Whether a process of that name is, or is not, there within a while."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if bool(numbers(name)) == wanted:
            return True
        time.sleep(0.05)
    return False


def gone(name: str) -> bool:
    """Whether no process of that name is left within a while."""
    return seen(name, wanted=False)


def numbers(name: str) -> list[int]:
    """Processes of this machine with that name."""
    return [int(process.name) for process in Path("/proc").glob("[0-9]*") if _name(process) == name]


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return ""
