"""What a former start left in a folder, for an evaluation that is started again: answers that need no model, and a judge's verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from asft_eval.backends import BACKENDS
from asft_eval.errors import EvaluationError
from asft_eval.requests import Part, former_rows, requests_of
from asft_eval.result import RESULTS, SAMPLES, Result, SuiteResult, fingerprint, read_result
from asft_eval.suites.prompts import CHAT, as_chat


class Answered:
    """Stands for a backend that has nothing left to be asked.

    Args:
        name: of the backend.
        versions: those that the answers were given with.
    """

    def __init__(self, name: str, versions: Mapping[str, str]):
        self.name, self.versions = name, versions

    def generate(self, *_: Any, **__: Any) -> NoReturn:
        """Never called."""
        raise AssertionError("a question was left, and no model is loaded")

    choice_logprobs = loglikelihood = generate


def former_result(out_dir: Path, model_dir: Path) -> Result | None:
    """The result of this model directory that the folder holds; None where there is none that can be read."""
    if not (model_dir.is_dir() and (out_dir / RESULTS).is_file()):
        return None
    try:
        former = read_result(out_dir)
    except EvaluationError:  # it is made anew
        return None
    return former if former.model["fingerprint"] == fingerprint(model_dir) else None


def all_answered(former: Result, backend: str, parts: Sequence[Part], model_dir: Path, out_dir: Path) -> bool:
    """Whether every request of an evaluation has its answer in the folder of a former result; a server is always asked who it is."""
    if backend not in BACKENDS or backend == "openai" or backend != former.backend:
        return False
    model = former.model["fingerprint"]
    wanted = {
        request.key
        for part in parts
        for request in requests_of(
            part, local_prompts(part, model_dir, of_server=False), model=model, backend=backend
        )
    }
    return len(former_rows(out_dir / SAMPLES, wanted)) == len(wanted)


def local_prompts(part: Part, model_dir: Path, *, of_server: bool) -> list[str]:
    """What is asked: an example's prompt, within the model's chat template where the suite wants that and no server applies it."""
    prompts = [example.prompt for example in part.suite.examples]
    return as_chat(model_dir, prompts) if part.suite.prompt == CHAT and not of_server else prompts


def judged_before(former: Result | None, part: Part, rows: Sequence[Mapping[str, Any]]) -> SuiteResult | None:
    """The figures that a judge's verdicts on these very answers gave; None where one of them has none."""
    if former is None or part.name not in former.suites or part.name not in former.for_judge:
        return None
    # The hash in `suites` is also the judge's.
    same = former.for_judge[part.name]["sha256"] == part.suite.sha256
    return former.suites[part.name] if same and all(row.get("correct") is not None for row in rows) else None
