"""What a former start left in a folder, for an evaluation that is started again: answers that need no model, a judge's verdicts, and what is not asked for now."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from asft_eval.backends import BACKENDS
from asft_eval.errors import EvaluationError
from asft_eval.requests import Part, former_rows, requests_of, whole_rows
from asft_eval.result import RESULTS, SAMPLES, Result, SuiteResult, fingerprint, read_result, write_whole
from asft_eval.suites.prompts import CHAT, as_chat

log = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What stays of a former result of the same model, because it is not measured now.

    Attributes:
        suites, for_judge, drift, versions: see `Result`.
        samples: of these suites.
    """

    suites: Mapping[str, SuiteResult] = field(default_factory=dict[str, SuiteResult])
    for_judge: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    drift: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    samples: Sequence[Mapping[str, Any]] = ()


def former_result(out_dir: Path) -> Result | None:
    """The result that the folder holds; None where there is none that can be read."""
    if not (out_dir / RESULTS).is_file():
        return None
    try:
        return read_result(out_dir)
    except EvaluationError:  # it is made anew
        return None


def require_same_model(former: Result | None, model_dir: Path, out_dir: Path) -> None:
    """Whether the folder may take this model's result: a directory that holds another model now may have its former one replaced.

    Raises:
        EvaluationError: it holds the result of another directory's model, which would be lost.
    """
    if former is None or Path(former.model["path"]).resolve() == model_dir.resolve():
        return
    if not model_dir.is_dir() or former.model["fingerprint"] != fingerprint(model_dir):
        raise other_model(former, out_dir)


def other_model(former: Result, out_dir: Path) -> EvaluationError:
    """What is said of a folder that holds another model's result."""
    return EvaluationError(
        f"{out_dir} holds the result of another model ({former.model['path']}): give another --out"
    )


def kept_of(former: Result | None, parts: Sequence[Part], out_dir: Path) -> Kept:
    """What stays: drift, and suites that are not asked for and have all their samples.

    Args:
        former: the folder's result of the same model.
        parts: what is asked for.
        out_dir: the folder.
    """
    if former is None:
        return Kept()
    asked = {part.name for part in parts}
    completions = {name: one.n * one.protocol.n for name, one in former.suites.items()}
    completions |= {name: int(one["n"]) for name, one in former.for_judge.items()}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in completions if name not in asked}
    if rows:
        for row in whole_rows(out_dir / SAMPLES):
            if row.get("suite") in rows and "correct" in row:
                rows[row["suite"]].append(row)
    whole = {name for name, own in rows.items() if len(own) == completions[name]}
    for name in rows:
        if name in whole:
            log.info("%s: measured before, kept", name)
        else:
            log.warning("%s: measured before, but %s lacks some of it: left out", name, out_dir / SAMPLES)
    return Kept(
        suites={name: one for name, one in former.suites.items() if name in whole},
        for_judge={name: one for name, one in former.for_judge.items() if name in whole},
        drift=former.drift,
        versions=former.versions if whole else {},
        samples=[row for name in rows if name in whole for row in rows[name]],
    )


def leave_only(kept: Kept, former: Result | None, out_dir: Path) -> None:
    """Takes what is measured anew out of the folder's `results.json`, which stands for finished evaluations."""
    if former is None or not (kept.suites or kept.for_judge or kept.drift):
        (out_dir / RESULTS).unlink(missing_ok=True)
        return
    left = replace(former, suites=kept.suites, for_judge=kept.for_judge, drift=kept.drift)
    write_whole(out_dir / RESULTS, json.dumps(left.to_json(), indent=2) + "\n")


def all_answered(former: Result, backend: str, parts: Sequence[Part], model_dir: Path, out_dir: Path) -> bool:
    """Whether every request of an evaluation has its answer in the folder of a former result; a server is always asked who it is."""
    if backend not in BACKENDS or backend == "openai" or not model_dir.is_dir():
        return False
    model = fingerprint(model_dir)
    if former.model["fingerprint"] != model:
        return False
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
