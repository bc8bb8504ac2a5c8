"""Why an example was judged as it was, for a reader: question, right answer, what was read out of each completion, and why."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asft_eval.errors import EvaluationError
from asft_eval.result import RESULTS, read_samples

_SHOWN = 1500
"""Characters of a prompt's and a completion's end that are shown: the answer stands there."""


def explain(result_dir: Path | str, example: str) -> str:
    """What `samples.jsonl` knows of one example, in words.

    Args:
        result_dir: folder of an evaluation.
        example: an example's id, or SUITE:ID where several suites have it and one is meant.

    Raises:
        EvaluationError: there is no such result or example, or it is not graded yet.
    """
    samples = read_samples(result_dir)
    open_ = not (Path(result_dir) / RESULTS).is_file() or any("correct" not in x for x in samples)
    unfinished = f"{result_dir} is not finished: evaluate with this directory as --out again"
    named = [x for x in samples if example in (str(x["id"]), f"{x['suite']}:{x['id']}")]
    if not samples:
        why = unfinished if open_ else f"{result_dir} has no example: it was evaluated without suites"
        raise EvaluationError(why)
    if not named:
        missing = f"has no example {example}: {_others(example, samples)}"
        raise EvaluationError(
            f"{result_dir} {missing}" if not open_ else f"{unfinished}; so far it {missing}"
        )
    found = [x for x in named if "correct" in x]
    if not found:
        raise EvaluationError(unfinished)
    words = [
        _words(found[i], first=i == 0 or found[i - 1]["suite"] != found[i]["suite"])
        for i in range(len(found))
    ]
    later = dict.fromkeys(str(x["suite"]) for x in named if "correct" not in x)
    words += [
        f"# {suite}, example {example.removeprefix(suite + ':')}\n\nnot graded yet: evaluate with this directory as --out again"
        for suite in later
    ]
    return "\n".join(words)


def _others(example: str, samples: Sequence[Mapping[str, Any]]) -> str:
    """Which ids were meant, perhaps."""
    known: dict[str, str] = {}
    for sample in samples:
        whole = f"{sample['suite']}:{sample['id']}"
        known[whole] = known[str(sample["id"])] = whole
    near = difflib.get_close_matches(example, known, n=3)
    if near:
        return f"the nearest are {', '.join(dict.fromkeys(known[x] for x in near))}"
    return f"its ids look like {', '.join(list(dict.fromkeys(known.values()))[:3])}"


def _words(sample: Mapping[str, Any], *, first: bool) -> str:
    head = [
        f"# {sample['suite']}, example {sample['id']}",
        "",
        _end(sample["prompt"]),
        "",
        f"right answer: {_end(sample['answer'])}",
    ]
    verdict = {None: "not judged", True: "right", False: "wrong"}[sample["correct"]]
    cut = "" if sample["finished"] else f", cut after {sample['num_tokens']} tokens"
    lines = [
        "",
        f"## completion {sample['sample'] + 1}: {verdict}{cut}",
        _end(sample["completion"]),
        f"read as the answer: {_end(sample['parsed']) or 'nothing'}",
        f"why: {sample['reason']}",
    ]
    if "logprobs" in sample:
        lines.append("log probabilities of the choices: " + " ".join(f"{x:.3f}" for x in sample["logprobs"]))
    return "\n".join([*(head if first else []), *lines])


def _end(text: str) -> str:
    return text if len(text) <= _SHOWN else f"[... {len(text) - _SHOWN} characters]{text[-_SHOWN:]}"
