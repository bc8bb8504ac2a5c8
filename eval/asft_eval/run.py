"""Evaluate one model on suites: one model load, every suite, one `results.json`."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import asft_eval
from asft_eval.backends import Backend, open_backend
from asft_eval.errors import EvaluationError
from asft_eval.graders import grade, require_permission
from asft_eval.protocols import protocols
from asft_eval.requests import Journal, Part, Request, parts_of, requests_of
from asft_eval.result import RESULTS, SAMPLES, Result, SuiteResult, fingerprint, write_result
from asft_eval.scoring import figures
from asft_eval.suites import load_suites
from asft_eval.suites.prompts import CHAT, as_chat
from asft_eval.types import Completion, Suite

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


def evaluate(
    model_dir: Path | str,
    suites: Sequence[Suite | Path | str],
    *,
    backend: str | Backend,
    out_dir: Path | str,
    max_tokens: int | None,
    batch_size: int,
    limit: int | None = None,
    protocol: str = "greedy",
    prompt: str | None = None,
    seed: int = 0,
    allow_code_execution: bool = False,
) -> Result:
    """Completions of every suite, graded; writes `results.json` and `samples.jsonl` into `out_dir`.

    Started again with the same `out_dir`, it asks only what has no answer there yet.

    Args:
        model_dir: a Hugging Face model directory.
        suites: suites, names or groups of `asft_eval.suites.SUITES`, or JSON-lines files of `prompt` and `answer`.
        backend: a name of `asft_eval.backends.BACKENDS`, or an open backend (its model must be `model_dir`'s).
        out_dir: created where missing; former results of something else in it are replaced.
        max_tokens: completions are cut after this many tokens; None = the protocol's own number.
        batch_size: prompts run together; ignored by an open backend.
        limit: only the first examples of each suite; recorded through the suite's hash.
        protocol: a name of `asft_eval.protocols`.
        prompt: the prompt variant of the suites named; None = each suite's own.
        seed: of what is drawn.
        allow_code_execution: whether graders may run programs that the model wrote, in a sandbox.

    Raises:
        EvaluationError: an unusable model, suite, protocol, backend or number.
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise EvaluationError(f"{name} is {value}: give at least 1")
    hows = protocols(protocol, max_tokens=max_tokens, seed=seed)
    parts = parts_of([suite.first(limit) for suite in _chosen(suites, prompt)], hows)
    for part in parts:
        require_permission(part.suite.name, part.suite.grader, allowed=allow_code_execution)
    engine = open_backend(backend, model_dir, batch_size=batch_size) if isinstance(backend, str) else backend
    model = fingerprint(model_dir)
    asked = [
        requests_of(part, _prompts(part.suite, model_dir), model=model, backend=engine.name) for part in parts
    ]
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / RESULTS).unlink(missing_ok=True)  # it stands for a finished evaluation
    journal = Journal(out_dir / SAMPLES, (request.key for requests in asked for request in requests))
    found: dict[str, SuiteResult] = {}
    samples: list[dict[str, Any]] = []
    for part, requests in zip(parts, asked, strict=True):
        _ask(engine, part, [x for x in requests if x.key not in journal.rows], journal)
        rows = _graded(part, requests, journal)
        found[part.name] = figures(part, rows)
        samples += rows
        log.info("%s: %.1f %% of %d", part.name, 100 * found[part.name].accuracy, found[part.name].n)
    result = Result(
        model={"path": str(model_dir), "fingerprint": model},
        backend=engine.name,
        protocol=protocol,
        seed=next((how.seed for how in hows if how.seed is not None), None),
        versions={"python": platform.python_version(), "asft_eval": asft_eval.__version__, **engine.versions},
        suites=found,
    )
    write_result(out_dir, result, samples)
    return result


def _chosen(suites: Sequence[Suite | Path | str], prompt: str | None) -> list[Suite]:
    chosen: list[Suite] = []
    named = [str(x) for x in suites if not isinstance(x, Suite)]
    if named:
        chosen = load_suites(named, prompt=prompt)
    chosen = [*(x for x in suites if isinstance(x, Suite)), *chosen]
    names = [suite.name for suite in chosen]
    if not names or len(set(names)) < len(names):
        raise EvaluationError(
            f"the suites are {', '.join(names) or 'none'}: give at least one, and each name once"
        )
    return chosen


def _prompts(suite: Suite, model_dir: Path) -> list[str]:
    prompts = [example.prompt for example in suite.examples]
    return as_chat(model_dir, prompts) if suite.prompt == CHAT else prompts


def _ask(engine: Backend, part: Part, requests: Sequence[Request], journal: Journal) -> None:
    """Asks in chunks and writes each chunk's answers down before the next; says how far it is."""
    started = said = time.perf_counter()
    size: int = getattr(engine, "requests_at_once", 1024)
    for start in range(0, len(requests), size):
        chunk = requests[start : start + size]
        journal.add(list(_answers(engine, part, chunk)))
        now, done = time.perf_counter(), start + len(chunk)
        if now - said >= _SECONDS_BETWEEN_LINES and done < len(requests):
            said = now
            left = (now - started) / done * (len(requests) - done)
            log.info("%s: %d of %d requests, about %.0f s to go", part.name, done, len(requests), left)


def _answers(engine: Backend, part: Part, chunk: Sequence[Request]) -> Iterator[dict[str, Any]]:
    prompts = [request.prompt for request in chunk]
    started = time.perf_counter()
    if part.suite.choices:
        logprobs = engine.choice_logprobs(prompts, part.suite.choices)
        completions = [Completion(_most_probable(part.suite.choices, row), 0, True) for row in logprobs]
    else:
        logprobs = [list[float]() for _ in chunk]
        seeds = [request.seed for request in chunk] if part.protocol.temperature > 0 else []
        completions = engine.generate(prompts, protocol=part.protocol, seeds=seeds)
    seconds = (time.perf_counter() - started) / len(chunk)
    for request, completion, row in zip(chunk, completions, logprobs, strict=True):
        yield request.row(completion, seconds, row)


def _most_probable(choices: Sequence[str], logprobs: Sequence[float]) -> str:
    return choices[max(range(len(choices)), key=logprobs.__getitem__)]


def _graded(part: Part, requests: Sequence[Request], journal: Journal) -> list[dict[str, Any]]:
    rows = [journal.rows[request.key] for request in requests]
    pairs = [(request.example, str(row["completion"])) for request, row in zip(requests, rows, strict=True)]
    scores = grade(part.suite.grader, pairs, allow_code_execution=True)  # refused before anything was asked
    return [
        {**row, "parsed": score.parsed, "correct": score.correct, "reason": score.reason}
        for row, score in zip(rows, scores, strict=True)
    ]
