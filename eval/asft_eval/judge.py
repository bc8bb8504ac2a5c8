"""AlpacaEval's second half: of every instruction, is the model's answer better than the suite's reference answer?

`evaluate` leaves such suites without a score and writes what the model said as `SUITE_outputs.json`, the file of `dataset`,
`instruction`, `output` and `generator` that the alpaca_eval package reads. A judge makes the score, then or days later:

    a model                a language model here or behind a server, asked once for each instruction (`judge_model`)
    alpaca_eval[:CONFIG]   the package, with its own annotator, reference answers and length-controlled win rate (`judge_package`)

The win rate is the share of instructions where the judge prefers the model's answer; what it did not say readably counts as not won.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from asft_eval.errors import EvaluationError
from asft_eval.folder import held, require_free
from asft_eval.requests import Part
from asft_eval.result import Result, SuiteResult, read_result, read_samples, write_result, write_whole
from asft_eval.statistics import standard_error, wilson_interval
from asft_eval.types import Protocol as EvaluationProtocol

NO_JUDGE = "its answers await a judge: asft eval judge RESULT_DIR --judge MODEL"
VERDICTS = "judge.json"

_SCORE = ("right", "accuracy", "stderr", "interval")


@dataclass(frozen=True, slots=True)
class Duel:
    """Two answers to one instruction."""

    id: str
    instruction: str
    output: str
    reference: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the judge prefers the model's answer, and what it said."""

    won: bool
    said: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a judge says of a suite.

    Attributes:
        verdicts: of every duel, in their order.
        unreadable: verdicts that no preference could be read out of.
        win_rate: where the judge gives probabilities of preferences their mean, else the share won; 0 to 1.
        length_controlled_win_rate: None = not computed, for the reason in `remark`.
        remark: what a reader of the figures must know.
    """

    verdicts: Sequence[Verdict]
    unreadable: int
    win_rate: float
    length_controlled_win_rate: float | None
    remark: str


class Judge(Protocol):
    """Compares answers."""

    name: str
    """For a reader."""

    @property
    def identity(self) -> str:
        """Of everything that a verdict depends on but the answers."""
        ...

    def decide(self, duels: Sequence[Duel], *, outputs: Path) -> Judgement:
        """The verdicts on a suite.

        Args:
            duels: of every instruction.
            outputs: the suite's outputs file; what the judge writes down goes beside it.
        """
        ...


def without_score(figures: SuiteResult) -> dict[str, Any]:
    """A suite's figures but for those that need a verdict."""
    return {key: value for key, value in asdict(figures).items() if key not in _SCORE}


def outputs_file(folder: Path, suite: str) -> Path:
    """Where the outputs of a suite lie."""
    return folder / f"{suite}_outputs.json"


def write_outputs(folder: Path, part: Part, rows: Sequence[Mapping[str, Any]], *, generator: str) -> None:
    """Write what the model said in the form that the alpaca_eval package reads.

    Args:
        folder: of the result.
        part: the suite; ids of its examples are DATASET/NUMBER.
        rows: one completion an example, in their order.
        generator: what the model is called there.
    """
    outputs = [
        {
            "dataset": example.id.rpartition("/")[0],
            "instruction": example.question,
            "output": str(row["completion"]).strip(),
            "generator": generator,
        }
        for example, row in zip(part.suite.examples, rows, strict=True)
    ]
    write_whole(outputs_file(folder, part.name), json.dumps(outputs, indent=2, ensure_ascii=False) + "\n")


def forget_verdicts(folder: Path, but: Container[str]) -> None:
    """Takes out of `judge.json` all suites but these, and the file where none is left."""
    file = folder / VERDICTS
    try:
        told: Any = json.loads(file.read_text(encoding="utf-8"))
        left = {name: one for name, one in told.items() if name in but}
    except FileNotFoundError:
        return
    except (ValueError, AttributeError):
        told, left = None, {}
    if not left:
        file.unlink()
    elif left != told:
        write_whole(file, json.dumps(left, indent=2) + "\n")


def judge_result(folder: Path | str, judge: Judge) -> Result:
    """Score the suites of a result that await a judge, or had another one; rewrites `results.json` and `samples.jsonl`.

    `judge.json` gets what there is beyond them: win rates, also length-controlled, and verdicts that could not be read.

    Raises:
        EvaluationError: there is no such result, it has no such suite, its files do not belong together, or the judge fails.
    """
    folder = Path(folder)
    result_for_judge(folder)
    with held(folder):
        return _judged(folder, judge)


def _judged(folder: Path, judge: Judge) -> Result:
    result, samples = read_result(folder), read_samples(folder)
    suites, told = dict(result.suites), dict[str, Any]()
    for name, asked in result.for_judge.items():
        rows = [row for row in samples if row["suite"] == name]
        outputs = outputs_file(folder, name)
        judgement = judge.decide(_duels(outputs, rows), outputs=outputs)
        for row, verdict in zip(rows, judgement.verdicts, strict=True):
            row.update(parsed="won" if verdict.won else "not won", correct=verdict.won, reason=verdict.said)
        suites[name] = _scored(asked, judge, judgement)
        told[name] = {"judge": judge.name, "identity": judge.identity, "n": len(rows)} | {
            key: value for key, value in asdict(judgement).items() if key != "verdicts"
        }
    result = replace(result, suites=suites)
    write_whole(folder / VERDICTS, json.dumps(told, indent=2) + "\n")
    write_result(folder, result, samples)
    return result


def result_for_judge(folder: Path | str) -> Result:
    """A result that has something for a judge, in a folder that can be written.

    Raises:
        EvaluationError: there is none there, it has not, or another process writes it.
    """
    result = read_result(folder)
    if not result.for_judge:
        raise EvaluationError(
            f"{folder} has no suite for a judge: evaluate a model with --suite alpaca_eval first"
        )
    require_free(Path(folder))
    return result


def _duels(outputs: Path, rows: Sequence[Mapping[str, Any]]) -> list[Duel]:
    try:
        said: list[dict[str, str]] = json.loads(outputs.read_text(encoding="utf-8"))
        pairs = list(zip(said, rows, strict=True))
        if any(one["output"] != str(row["completion"]).strip() for one, row in pairs):
            raise ValueError("other answers")
        return [
            Duel(str(row["id"]), one["instruction"], one["output"], str(row["answer"])) for one, row in pairs
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{outputs} does not belong to the samples beside it ({error!r}): evaluate with this directory as --out again"
        ) from error


def _scored(asked: Mapping[str, Any], judge: Judge, judgement: Judgement) -> SuiteResult:
    won, n = sum(verdict.won for verdict in judgement.verdicts), len(judgement.verdicts)
    # Another judge is another measurement: results of two are not compared.
    digest = hashlib.sha256(f"{asked['sha256']} {judge.identity}".encode()).hexdigest()
    settings: dict[str, Any] = {**asked, "protocol": EvaluationProtocol(**asked["protocol"])}
    settings |= {"sha256": digest, "grader": f"judge {judge.name}"}
    return SuiteResult(
        **settings,
        right=won,
        accuracy=won / n,
        stderr=standard_error(won, n),
        interval=wilson_interval(won, n),
    )
