"""Programs in the form that evalplus grades, so that its own verdicts can be set beside those of the sandbox.

evalplus is not called here: it runs what a model wrote in processes that can read this machine's files and reach its network. Its authors offer a
container for that; the file is what goes into it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asft_eval.requests import Part
from asft_eval.result import write_whole

_TASK: Mapping[str, str] = {"humaneval": "{}", "humaneval_plus": "{}", "mbpp_plus": "Mbpp/{}"}
"""Suite -> what evalplus calls a task. It has no other tasks of MBPP than those of MBPP+."""


def samples_file(folder: Path, name: str) -> Path:
    """Where the programs of a suite lie."""
    return folder / f"{name}_evalplus.jsonl"


def write_evalplus(folder: Path, part: Part, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the programs of a suite that evalplus has, as they were read out of the completions; nothing for any other suite.

    Args:
        folder: of the result.
        part: the suite and its protocol.
        rows: every graded completion; `parsed` is a whole program.
    """
    task = _TASK.get(part.suite.name)
    if task is None:
        return
    lines = [
        json.dumps({"task_id": task.format(row["id"]), "solution": row["parsed"]}, ensure_ascii=False)
        for row in rows
    ]
    write_whole(samples_file(folder, part.name), "".join(f"{line}\n" for line in lines))
