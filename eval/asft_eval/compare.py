"""Several results side by side: only what was measured alike is compared, and chance is told from difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from asft_eval.alike import unlike
from asft_eval.answers import Answers, read_answers
from asft_eval.errors import EvaluationError
from asft_eval.resampling import (
    COVERAGE,
    RESAMPLES,
    SEED,
    Floats,
    Interval,
    bootstrap,
    holm,
    scores,
    sign_flip,
)
from asft_eval.result import Result, SuiteResult, read_result
from asft_eval.statistics import wilson_interval

SCHEMA_VERSION = 2
MEAN = "mean of suites"
LEVEL = 1 - COVERAGE


@dataclass(frozen=True, slots=True)
class Change:
    """Examples of a suite that a model answers rightly, or more often so, than the first model (`gained`), and the reverse (`lost`)."""

    gained: int
    lost: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A model's score minus the first model's, paired by example.

    Attributes:
        n: examples.
        value, low, high: the difference and its 95 % bootstrap interval.
        p: of a sign-flip test that the two are alike.
        p_adjusted: by Holm, over all models and suites of the comparison; over the models for a mean of suites.
    """

    n: int
    value: float
    low: float
    high: float
    p: float
    p_adjusted: float

    @property
    def significant(self) -> bool:
        """Whether adjusted test and interval both say so."""
        return self.p_adjusted < LEVEL and not self.low <= 0 <= self.high

    @property
    def mark(self) -> str:
        """▲ better, ▼ worse than the first model, empty where chance may explain it."""
        return "" if not self.significant else "▲" if self.value > 0 else "▼"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Results by name, the first being the one that the others are compared with.

    Attributes:
        results: name -> result, in the order given.
        suites: names of the suites that every result has.
        left_out: names of the suites that only some have.
        means: names of the rows that stand for all suites of a protocol -> the suites in them.
        scores: (name, suite or mean) -> accuracy and its 95 % interval.
        differences: (name, suite or mean) -> difference to the first model, for all others.
        changes: (name, suite) -> examples gained and lost against the first result.
        gaps: name -> suite -> example -> its score minus the first model's, for all others.
        warnings: why the results are not strictly comparable; empty unless forced.
    """

    results: Mapping[str, Result]
    suites: tuple[str, ...]
    left_out: tuple[str, ...]
    means: Mapping[str, tuple[str, ...]]
    scores: Mapping[tuple[str, str], Interval]
    differences: Mapping[tuple[str, str], Difference]
    changes: Mapping[tuple[str, str], Change]
    gaps: Mapping[str, Mapping[str, Mapping[str, float]]]
    warnings: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Suites, then means."""
        return (*self.suites, *self.means)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: a row a model, a column a suite, each cell accuracy, 95 % interval in per cent, mark of a difference."""
        rows = [[name, *(self._cell(name, column) for column in self.columns)] for name in self.results]
        return ["model", *self.columns], rows

    def _cell(self, name: str, column: str) -> str:
        score, difference = self.scores[name, column], self.differences.get((name, column))
        mark = f" {difference.mark}" if difference and difference.mark else ""
        return f"{100 * score.value:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]{mark}"

    @property
    def calibrations(self) -> dict[tuple[str, str], float]:
        """(name, suite) -> expected calibration error, of the suites that have one; results from before schema version 4 have none."""
        return {
            (name, suite): found["ece"]
            for name, result in self.results.items()
            for suite in self.suites
            if (found := result.suites[suite].calibration) is not None
        }

    def calibration_table(self) -> tuple[list[str], list[list[str]]] | None:
        """Header and rows: a row a model, a column a suite of multiple choice; None where there is none."""
        found = self.calibrations
        suites = [suite for suite in self.suites if any(key[1] == suite for key in found)]
        if not suites:
            return None
        rows = [
            [name, *(f"{found[name, suite]:.3f}" if (name, suite) in found else "–" for suite in suites)]
            for name in self.results
        ]
        return ["model", *suites], rows

    def to_json(self) -> dict[str, Any]:
        """What `comparison.json` holds; docs/evaluation.md describes it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "results": {name: result.to_json() for name, result in self.results.items()},
            "suites": list(self.suites),
            "left_out": list(self.left_out),
            "means": {name: list(suites) for name, suites in self.means.items()},
            "statistics": {
                "interval": "percentile bootstrap over examples",
                "test": "paired sign flip over examples",
                "correction": "holm",
                "coverage": COVERAGE,
                "resamples": RESAMPLES,
                "seed": SEED,
            },
            "scores": _rows(self.scores),
            "differences": [
                {**row, "significant": self.differences[row["model"], row["suite"]].significant}
                for row in _rows(self.differences)
            ],
            "changes": _rows(self.changes),
            "calibration": [
                {"model": name, "suite": suite, "ece": ece}
                for (name, suite), ece in self.calibrations.items()
            ],
            "warnings": list(self.warnings),
        }


def _rows(figures: Mapping[tuple[str, str], Any]) -> list[dict[str, Any]]:
    return [{"model": name, "suite": suite, **asdict(one)} for (name, suite), one in figures.items()]


def compare(results: Mapping[str, Path | str], *, force: bool = False) -> Comparison:
    """Put result directories side by side.

    Args:
        results: name -> directory of a `results.json`; the first is the one compared with.
        force: compare in spite of different protocols, suites, prompts or texts, and say so in `warnings`.

    Raises:
        EvaluationError: no result, nothing in common, an unreadable result, or results that were not measured alike.
    """
    if not results:
        raise EvaluationError("there is nothing to compare: name at least one result directory")
    read = {name: read_result(directory) for name, directory in results.items()}
    every = list(dict.fromkeys(suite for result in read.values() for suite in result.suites))
    common = tuple(suite for suite in every if all(suite in result.suites for result in read.values()))
    if not common and (every or any(result.drift is None for result in read.values())):
        raise EvaluationError("the results have no suite in common: evaluate the models on the same suites")
    answers = {name: read_answers(results[name], result) for name, result in read.items()}
    differences = unlike(read, answers, common)
    if differences and not force:
        raise EvaluationError(f"{'; '.join(differences)}: evaluate alike, or force the comparison")
    first = next(iter(read.values()))
    means = _means({suite: first.suites[suite] for suite in common})
    gaps = {name: _gaps(answers[name], next(iter(answers.values())), common) for name in list(read)[1:]}
    pairs = {
        name: {suite: np.array([*own.values()]) for suite, own in suites.items()}
        for name, suites in gaps.items()
    }
    return Comparison(
        results=read,
        suites=common,
        left_out=tuple(suite for suite in every if suite not in common),
        means=means,
        scores=_scores(answers, common, means),
        differences=_corrected(pairs, _columns(common)) | _corrected(pairs, means),
        changes={(name, suite): Change(0, 0) for name in list(read)[:1] for suite in common}
        | {(name, suite): _change(own) for name, suites in gaps.items() for suite, own in suites.items()},
        gaps=gaps,
        warnings=tuple(differences),
    )


def _means(figures: Mapping[str, SuiteResult]) -> dict[str, tuple[str, ...]]:
    """A row for the suites of each way of drawing, where there are several: greedy and sampled scores are not mixed."""
    groups: dict[str, list[str]] = {}
    for suite, one in figures.items():
        drawn = f"{MEAN} @{one.protocol.name}" if one.protocol.temperature > 0 else MEAN
        groups.setdefault(drawn, []).append(suite)
    return {name: tuple(suites) for name, suites in groups.items() if len(suites) > 1}


def _scores(
    answers: Mapping[str, Answers], suites: Sequence[str], means: Mapping[str, Sequence[str]]
) -> dict[tuple[str, str], Interval]:
    found: dict[tuple[str, str], Interval] = {}
    for name, own in answers.items():
        strata = {suite: scores(list(own.scores[suite].values())) for suite in suites}
        for column, members in {**_columns(suites), **means}.items():
            interval = bootstrap([strata[suite] for suite in members])
            if (
                interval.low == interval.high
            ):  # all right or all wrong: nothing to resample, but not certain either
                n = sum(len(strata[suite].sums) for suite in members)
                low, high = wilson_interval(interval.value * n, n)
                interval = replace(interval, low=low, high=high)
            found[name, column] = interval
    return found


def _columns(suites: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {suite: (suite,) for suite in suites}


def _gaps(own: Answers, first: Answers, suites: Sequence[str]) -> dict[str, dict[str, float]]:
    """Suite -> example -> difference, of the examples that both have."""
    return {
        suite: {
            example: score - first.scores[suite][example]
            for example, score in own.scores[suite].items()
            if example in first.scores[suite]
        }
        for suite in suites
    }


def _change(gaps: Mapping[str, float]) -> Change:
    return Change(sum(gap > 0 for gap in gaps.values()), sum(gap < 0 for gap in gaps.values()))


def _corrected(
    pairs: Mapping[str, Mapping[str, Floats]], columns: Mapping[str, Sequence[str]]
) -> dict[tuple[str, str], Difference]:
    """The differences of one family of tests: all models in all columns, each of which stands for some suites."""
    found: dict[tuple[str, str], Difference] = {}
    for name, own in pairs.items():
        for column, suites in columns.items():
            gaps = [own[suite] for suite in suites]
            if any(not len(one) for one in gaps):
                raise EvaluationError(f"the results share no example of {column}: evaluate the same examples")
            interval = bootstrap([scores(one) for one in gaps])
            n = sum(len(one) for one in gaps)
            found[name, column] = Difference(
                n, interval.value, interval.low, interval.high, sign_flip(gaps), 1.0
            )
    adjusted = holm([one.p for one in found.values()])
    return {key: replace(one, p_adjusted=p) for (key, one), p in zip(found.items(), adjusted, strict=True)}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub-flavoured table; bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
