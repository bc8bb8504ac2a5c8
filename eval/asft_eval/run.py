"""Evaluate one model on suites: one model load, every suite, one `results.json`."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asft_eval
from asft_eval.again import (
    UNFINISHED,
    Answered,
    Kept,
    all_answered,
    drop_former,
    drop_sides,
    former_result,
    judged_before,
    kept_of,
    leave_only,
    local_prompts,
    owner_of,
    require_known,
    require_same_model,
)
from asft_eval.asking import ask
from asft_eval.backends import OWN, Backend, Options, check_options, opened, require_installed
from asft_eval.errors import EvaluationError
from asft_eval.evalplus import write_evalplus
from asft_eval.folder import held
from asft_eval.graders import JUDGED, grade, require_library, require_permission
from asft_eval.judge import NO_JUDGE, without_score, write_outputs
from asft_eval.protocols import protocols
from asft_eval.requests import OTHERS, Journal, Part, Request, parts_of, requests_of
from asft_eval.result import SAMPLES, Result, SuiteResult, fingerprint, write_result
from asft_eval.scoring import figures
from asft_eval.suites import load_suites
from asft_eval.types import Suite

if TYPE_CHECKING:
    from asft_eval.drift import DriftRequest

log = logging.getLogger(__name__)


def evaluate(
    model_dir: Path | str,
    suites: Sequence[Suite | Path | str],
    *,
    backend: str | Backend,
    out_dir: Path | str,
    max_tokens: int | None,
    options: Options = OWN,
    limit: int | None = None,
    protocol: str = "greedy",
    prompt: str | None = None,
    seed: int = 0,
    allow_code_execution: bool = False,
    drift: DriftRequest | None = None,
) -> Result:
    """Completions of every suite, graded; writes `results.json` and `samples.jsonl` into `out_dir`.

    Started again with the same `out_dir`, it asks only what has no answer there yet, and loads no model where nothing is left to ask. A judge's
    verdicts on answers that stay are kept. So are, of the same model, suites and drift that `out_dir` has and that are not asked for, and answers that
    no result counts now (`other_answers.jsonl`). While it runs no other process may write into `out_dir`.

    Args:
        model_dir: a Hugging Face model directory; for the backend `openai` also a name that the server knows.
        suites: suites, names or groups of `asft_eval.suites.SUITES`, or JSON-lines files of `prompt` and `answer`.
        backend: a name of `asft_eval.backends.BACKENDS`, or an open backend (its model must be `model_dir`'s).
        out_dir: created where missing; the result of what the same directory held before is replaced.
        max_tokens: completions are cut after this many tokens; None = the protocol's own number.
        options: how the backend is opened; of no use to an open one.
        limit: only the first examples of each suite; recorded through the suite's hash.
        protocol: a name of `asft_eval.protocols`.
        prompt: the prompt variant of the suites named; None = each suite's own.
        seed: of what is drawn.
        allow_code_execution: whether graders may run programs that the model wrote, in a sandbox.
        drift: held-out text that the model reads, too, and the base that its drift is measured from.

    Raises:
        EvaluationError: an unusable model, suite, protocol, backend, option, number or `out_dir`; or `out_dir` has what would be lost.
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    for name, value in (("max_tokens", max_tokens), ("limit", limit)):
        if value is not None and value < 1:
            raise EvaluationError(f"{name} is {value}: give at least 1")
    hows = protocols(protocol, max_tokens=max_tokens, seed=seed)
    parts = parts_of([suite.first(limit) for suite in _chosen(suites, prompt)], hows)
    for part in parts:
        require_permission(part.suite.name, part.suite.grader, allowed=allow_code_execution)
        require_library(part.suite.name, part.suite.grader)
    with held(out_dir, model_dir, drift.base if drift else None), ExitStack() as until_written:
        former = former_result(out_dir)
        opener = _opener(backend, former, parts, model_dir, out_dir, options)
        owner = owner_of(former, out_dir)
        require_same_model(owner, model_dir, out_dir)
        # Before the backend holds the model, so that the two never share memory.
        found_drift = _drift(model_dir, drift, out_dir)
        engine = until_written.enter_context(opener())
        if any(part.suite.choices for part in parts):
            getattr(engine, "require_logprobs", bool)()
        model = {
            "path": str(model_dir),
            "fingerprint": getattr(engine, "fingerprint", None) or fingerprint(model_dir),
        }
        if owner is not None and owner["fingerprint"] != model["fingerprint"]:
            drop_former(owner, former, model_dir, out_dir, drift_too=found_drift is None)
            former = None
        asked = _asked(engine, parts, model)
        require_known(owner, {request.key for requests in asked for request in requests}, out_dir)
        kept = kept_of(former, parts, out_dir)
        found = _measured(engine, parts, asked, former, kept, out_dir, model)
        versions = {"python": platform.python_version(), "asft_eval": asft_eval.__version__}
        result = Result(
            model=model,
            backend=engine.name,
            protocol=protocol,
            seed=next((how.seed for how in hows if how.seed is not None), None),
            versions={**kept.versions, **engine.versions, **versions},
            suites={**kept.suites, **found.suites},
            drift=found_drift or kept.drift,
            for_judge={**kept.for_judge, **found.for_judge},
        )
        gone = set(former.suites) - set(result.suites) if former is not None else set[str]()
        drop_sides(out_dir, gone - set(result.for_judge), verdicts_of=result.suites)
        write_result(out_dir, result, [*kept.samples, *found.samples])
        (out_dir / UNFINISHED).unlink(missing_ok=True)
    return result


@dataclass(slots=True)
class _Found:
    suites: dict[str, SuiteResult] = field(default_factory=dict[str, SuiteResult])
    for_judge: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    samples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def _asked(engine: Backend, parts: Sequence[Part], model: Mapping[str, str]) -> list[list[Request]]:
    """The requests of each part."""
    of_server = getattr(engine, "applies_chat_template", False)
    return [
        requests_of(
            part,
            local_prompts(part, Path(model["path"]), of_server=of_server),
            model=model["fingerprint"],
            backend=engine.name,
        )
        for part in parts
    ]


def _measured(
    engine: Backend,
    parts: Sequence[Part],
    asked: Sequence[Sequence[Request]],
    former: Result | None,
    kept: Kept,
    out_dir: Path,
    model: Mapping[str, str],
) -> _Found:
    """Asks what is open and grades everything that was asked for; files of the folder are touched from here on."""
    leave_only(kept, former, out_dir, model)
    judged_suites = set(former.suites) & set(former.for_judge) if former is not None else set[str]()
    drop_sides(out_dir, [part.name for part in parts], verdicts_of=judged_suites)
    wanted = (request.key for requests in asked for request in requests)
    journal = Journal(out_dir / SAMPLES, wanted, beside=kept.samples, aside=out_dir / OTHERS)
    found = _Found()
    for part, requests in zip(parts, asked, strict=True):
        ask(engine, part, [x for x in requests if x.key not in journal.rows], journal)
        rows = [request.again(journal.rows[request.key]) for request in requests]
        judged = judged_before(former, part, rows) if part.suite.grader == JUDGED else None
        if judged is None:
            rows = _graded(part, requests, rows)
        else:
            found.suites[part.name] = judged
        found.samples += rows
        one = figures(part, rows, backend=engine.name)
        if part.suite.grader == JUDGED:
            found.for_judge[part.name] = without_score(one)
            write_outputs(out_dir, part, rows, generator=model["path"])
            continue
        write_evalplus(out_dir, part, rows)
        found.suites[part.name] = one
        log.info("%s: %.1f %% of %d", part.name, 100 * one.accuracy, one.n)
    return found


def _drift(model_dir: Path, request: DriftRequest | None, out_dir: Path) -> dict[str, Any] | None:
    if request is None:
        return None
    from asft_eval.drift import measure

    return measure(model_dir, request, out_dir)


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


def _opener(
    backend: str | Backend,
    former: Result | None,
    parts: Sequence[Part],
    model_dir: Path,
    out_dir: Path,
    options: Options,
) -> Callable[[], AbstractContextManager[Backend]]:
    """What opens the backend and closes it if it was opened here; all that can be said against that without loading the model is said now."""
    if not isinstance(backend, str):
        return lambda: nullcontext(backend)
    check_options(backend, options)
    if former is not None and all_answered(former, backend, parts, model_dir, out_dir):
        log.info("every answer is in %s: no model is loaded", out_dir)
        versions = former.versions
        return lambda: nullcontext(Answered(backend, versions))
    require_installed(backend, model_dir)
    return lambda: opened(backend, model_dir, options)


def _graded(
    part: Part, requests: Sequence[Request], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    if part.suite.grader == JUDGED:
        return [{**row, "parsed": "", "correct": None, "reason": NO_JUDGE} for row in rows]
    pairs = [(request.example, str(row["completion"])) for request, row in zip(requests, rows, strict=True)]
    scores = grade(part.suite.grader, pairs, allow_code_execution=True)  # refused before anything was asked
    return [
        {**row, "parsed": score.parsed, "correct": score.correct, "reason": score.reason}
        for row, score in zip(rows, scores, strict=True)
    ]
