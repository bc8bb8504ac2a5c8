"""What a former start left in a folder, for an evaluation that is started again: answers that need no model, a judge's verdicts, and what is not asked for now."""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from asft_eval.backends import BACKENDS
from asft_eval.errors import EvaluationError
from asft_eval.evalplus import samples_file
from asft_eval.judge import forget_verdicts, outputs_file
from asft_eval.requests import OTHERS, Part, former_keys, requests_of, whole_rows
from asft_eval.result import RESULTS, SAMPLES, Result, SuiteResult, fingerprint, read_result, write_whole
from asft_eval.suites.prompts import CHAT, as_chat

log = logging.getLogger(__name__)

UNFINISHED = "unfinished.json"
"""Whose answers an evaluation gathers: there until `results.json` says it."""


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
    """The result that the folder holds; None where there is none.

    Raises:
        EvaluationError: it cannot be read; what it says would be lost.
    """
    return read_result(out_dir) if (out_dir / RESULTS).is_file() else None


def owner_of(former: Result | None, out_dir: Path) -> Mapping[str, str] | None:
    """`path` and `fingerprint` of the model whose answers the folder has, also of an evaluation that was cut off; None = it does not say."""
    if former is not None:
        return former.model
    try:
        found: Any = json.loads((out_dir / UNFINISHED).read_text(encoding="utf-8"))
        return {"path": str(found["path"]), "fingerprint": str(found["fingerprint"])}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def require_same_model(owner: Mapping[str, str] | None, model_dir: Path, out_dir: Path) -> None:
    """Whether the folder may take this model's result: a directory that holds another model now may have its former one replaced.

    Args:
        owner: see `owner_of`.
        model_dir: what is evaluated.
        out_dir: the folder.

    Raises:
        EvaluationError: it holds the result of another directory's model, which would be lost.
    """
    if owner is None or Path(owner["path"]).resolve() == model_dir.resolve():
        return
    if not model_dir.is_dir() or owner["fingerprint"] != fingerprint(model_dir):
        raise EvaluationError(
            f"{out_dir} holds the result of another model ({owner['path']}): give another --out, or empty that folder"
        )


def drop_former(
    owner: Mapping[str, str], former: Result | None, model_dir: Path, out_dir: Path, *, drift_too: bool
) -> None:
    """Takes away what a folder has of a model whose directory holds other weights now; a warning says what it was.

    Args:
        owner: see `owner_of`.
        former: the folder's result.
        model_dir: the model's directory.
        out_dir: the folder.
        drift_too: False where the drift has been measured anew already.

    Raises:
        EvaluationError: the model is a server's: the same name at another address may well be the same model.
    """
    if not model_dir.is_dir():
        raise EvaluationError(
            f"{out_dir} holds answers of {owner['path']} behind another address, which this server's need not be like: give the --base-url of before, or another --out"
        )
    rows = [row for name in (SAMPLES, OTHERS) for row in whole_rows(out_dir / name)]
    names = {str(row.get("suite")) for row in rows}
    if former is not None:
        names |= {*former.suites, *former.for_judge}
    drift = drift_too and former is not None and former.drift is not None
    log.warning(
        "%s holds other weights than when %s was written: dropped are %d answers (%s)%s",
        model_dir, out_dir, len(rows), ", ".join(sorted(names)) or "of no suite", " and the drift" * drift,
    )  # fmt: skip
    for name in (RESULTS, SAMPLES, OTHERS, *(["held_out.json"] if drift_too else [])):
        (out_dir / name).unlink(missing_ok=True)
    drop_sides(out_dir, names, verdicts_of=())


def drop_sides(out_dir: Path, suites: Iterable[str], *, verdicts_of: Container[str]) -> None:
    """Takes away the files beside `samples.jsonl` that were made of a suite's former answers.

    Args:
        out_dir: the folder.
        suites: that are measured anew, or gone.
        verdicts_of: suites whose verdicts in `judge.json` still hold.
    """
    for name in suites:
        samples_file(out_dir, name).unlink(missing_ok=True)
        outputs_file(out_dir, name).unlink(missing_ok=True)
    forget_verdicts(out_dir, verdicts_of)


def require_known(owner: Mapping[str, str] | None, wanted: set[str], out_dir: Path) -> None:
    """Whether answers that do not say of which model they are can be taken for this one's.

    Args:
        owner: see `owner_of`.
        wanted: keys of the requests, which are of one model.
        out_dir: the folder.

    Raises:
        EvaluationError: there are answers, and none is to such a request.
    """
    if owner is None and any(whole_rows(out_dir / SAMPLES)) and not former_keys(out_dir, wanted):
        raise EvaluationError(
            f"{out_dir / SAMPLES} holds answers and nothing says of which model: give another --out, or empty that folder"
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


def leave_only(kept: Kept, former: Result | None, out_dir: Path, model: Mapping[str, str]) -> None:
    """Takes what is measured anew out of the folder's `results.json`, which stands for finished evaluations, and says whose answers come.

    Args:
        kept: what stays.
        former: the folder's result.
        out_dir: the folder.
        model: `path` and `fingerprint`.
    """
    write_whole(out_dir / UNFINISHED, json.dumps(model) + "\n")
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
    return len(former_keys(out_dir, wanted)) == len(wanted)


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
