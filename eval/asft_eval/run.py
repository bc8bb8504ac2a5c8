"""Evaluate one model on suites: one model load, every suite, one `results.json`."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asft_eval
from asft_eval.backends import Backend, open_backend
from asft_eval.errors import EvaluationError
from asft_eval.graders import grader
from asft_eval.result import Result, SuiteResult, fingerprint, write_result
from asft_eval.statistics import standard_error, wilson_interval
from asft_eval.suites import load_jsonl
from asft_eval.types import Completion, Protocol, Score, Suite

log = logging.getLogger(__name__)


def evaluate(
    model_dir: Path | str,
    suites: Sequence[Suite | Path | str],
    *,
    backend: str | Backend,
    out_dir: Path | str,
    max_tokens: int,
    batch_size: int,
    limit: int | None = None,
) -> Result:
    """Greedy completions of every suite, graded; writes `results.json` and `samples.jsonl` into `out_dir`.

    Args:
        model_dir: a Hugging Face model directory.
        suites: suites, or JSON-lines files of `prompt` and `answer`.
        backend: a name of `asft_eval.backends.BACKENDS`, or an open backend (its model must be `model_dir`'s).
        out_dir: created where missing; former results in it are replaced.
        max_tokens: completions are cut after this many tokens.
        batch_size: prompts run together; ignored by an open backend.
        limit: only the first examples of each suite; recorded through the suite's hash.

    Raises:
        EvaluationError: an unusable model, suite, backend or number.
    """
    model_dir = Path(model_dir)
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise EvaluationError(f"{name} is {value}: give at least 1")
    chosen = [(x if isinstance(x, Suite) else load_jsonl(x)).first(limit) for x in suites]
    names = [suite.name for suite in chosen]
    if not names or len(set(names)) < len(names):
        raise EvaluationError(
            f"the suites are {', '.join(names) or 'none'}: give at least one, and each name once"
        )
    protocol = Protocol(max_tokens=max_tokens)
    engine = open_backend(backend, model_dir, batch_size=batch_size) if isinstance(backend, str) else backend
    figures: dict[str, SuiteResult] = {}
    samples: list[dict[str, Any]] = []
    for suite in chosen:
        started = time.perf_counter()
        completions = engine.generate([example.prompt for example in suite.examples], protocol=protocol)
        seconds = time.perf_counter() - started
        judge = grader(suite.grader)
        pairs = zip(completions, suite.examples, strict=True)
        scores = [judge(completion.text, example.answer) for completion, example in pairs]
        figures[suite.name] = _figures(suite, completions, scores, seconds)
        samples.extend(_samples(suite, completions, scores))
        log.info("%s: %.1f %% of %d", suite.name, 100 * figures[suite.name].accuracy, len(scores))
    result = Result(
        model={"path": str(model_dir), "fingerprint": fingerprint(model_dir)},
        backend=engine.name,
        protocol=protocol,
        seed=None,
        versions={"python": platform.python_version(), "asft_eval": asft_eval.__version__, **engine.versions},
        suites=figures,
    )
    write_result(Path(out_dir), result, samples)
    return result


def _figures(suite: Suite, completions: list[Completion], scores: list[Score], seconds: float) -> SuiteResult:
    n, right = len(scores), sum(score.correct for score in scores)
    return SuiteResult(
        version=suite.version,
        sha256=suite.sha256,
        grader=suite.grader,
        n=n,
        right=right,
        accuracy=right / n,
        stderr=standard_error(right, n),
        interval=wilson_interval(right, n),
        tokens=sum(completion.num_tokens for completion in completions),
        cut=sum(not completion.finished for completion in completions),
        seconds=seconds,
    )


def _samples(suite: Suite, completions: list[Completion], scores: list[Score]) -> list[dict[str, Any]]:
    return [
        {
            "suite": suite.name,
            "id": example.id,
            "prompt": example.prompt,
            "answer": example.answer,
            "completion": completion.text,
            "parsed": score.parsed,
            "correct": score.correct,
            "reason": score.reason,
        }
        for example, completion, score in zip(suite.examples, completions, scores, strict=True)
    ]
