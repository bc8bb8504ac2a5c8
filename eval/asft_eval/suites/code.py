"""Rows of HumanEval and MBPP, and of their "+" sets as published on the hub, as questions with tests."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Sequence

from asft_eval.graders.code import Problem
from asft_eval.suites.records import Asked, Record

_BODY = "\n    pass\n"  # makes of a prompt a program whose helpers tests can call


def humaneval(row: Record) -> Asked:
    """`task_id`, `prompt`, `entry_point`, `test` (a function `check`); HumanEval+ has the same fields."""
    name: str = row["entry_point"]
    problem = Problem(
        prompt=row["prompt"],
        helpers=row["prompt"] + _BODY,
        tests=f"{row['test']}\ncheck({name})\n",
        functions=(name,),
    )
    return Asked(row["task_id"], row["prompt"], problem.to_answer())


def mbpp(row: Record) -> Asked:
    """`task_id`, `text` (or `prompt`), `test_list`, `test_setup_code` (or `test_imports`); MBPP+ has a whole `test` besides.

    The question is evalplus's: the task and its first test as a docstring, without examples.
    """
    asserts: Sequence[str] = row["test_list"]
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or ())
    tests: str = row.get("test") or "\n".join([setup, *asserts])
    task = (row["text"] if "text" in row else row["prompt"]).strip()
    problem = Problem(
        prompt="", helpers="", tests=tests, functions=called_names("\n".join([setup, *asserts]))
    )
    return Asked(str(row["task_id"]), f'"""\n{task}\n{asserts[0]}\n"""\n', problem.to_answer())


def called_names(tests: str) -> tuple[str, ...]:
    """Names that tests use and neither define nor import: the program has to define them.

    Raises:
        ValueError: the tests are no Python, or use no such name.
    """
    try:
        tree = ast.parse(tests)
    except SyntaxError as error:
        raise ValueError(f"the tests are no Python: {error}") from error
    used: dict[str, None] = {}
    bound = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used[node.id] = None
        elif isinstance(node, ast.Name):
            bound.add(node.id)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
    names = tuple(name for name in used if name not in bound)
    if not names:
        raise ValueError("the tests call nothing")
    return names
