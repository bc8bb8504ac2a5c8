"""Several results side by side: only what was measured alike is compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from asft_eval.errors import EvaluationError
from asft_eval.result import Result, SuiteResult, read_result, read_samples


@dataclass(frozen=True, slots=True)
class Change:
    """Examples of a suite that a model answers rightly, or more often so, than the first model (`gained`), and the reverse (`lost`)."""

    gained: int
    lost: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Results by name, the first being the one that the others are compared with.

    Attributes:
        results: name -> result, in the order given.
        suites: names of the suites that every result has.
        changes: (name, suite) -> examples gained and lost against the first result.
        warnings: why the results are not strictly comparable; empty unless forced.
    """

    results: Mapping[str, Result]
    suites: tuple[str, ...]
    changes: Mapping[tuple[str, str], Change]
    warnings: tuple[str, ...]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: a row a model, a column a suite, each cell accuracy and 95 % interval in per cent."""
        rows = [
            [name, *(_cell(result.suites[suite]) for suite in self.suites)]
            for name, result in self.results.items()
        ]
        return ["model", *self.suites], rows


def compare(results: Mapping[str, Path | str], *, force: bool = False) -> Comparison:
    """Put result directories side by side.

    Args:
        results: name -> directory of a `results.json`; the first is the one compared with.
        force: compare in spite of different protocols or suites, and say so in `warnings`.

    Raises:
        EvaluationError: no result, nothing in common, an unreadable result, or results that were not measured alike.
    """
    if not results:
        raise EvaluationError("there is nothing to compare: name at least one result directory")
    read = {name: read_result(directory) for name, directory in results.items()}
    first = next(iter(read.values()))
    common = tuple(suite for suite in first.suites if all(suite in result.suites for result in read.values()))
    if not common:
        raise EvaluationError("the results have no suite in common: evaluate the models on the same suites")
    differences = _differences(read, common)
    if differences and not force:
        raise EvaluationError(f"{'; '.join(differences)}: evaluate alike, or force the comparison")
    return Comparison(read, common, _changes(results, common), tuple(differences))


def _differences(read: Mapping[str, Result], suites: Sequence[str]) -> list[str]:
    (first_name, first), *others = read.items()
    differences: list[str] = []
    for name, result in others:
        if any(result.suites[suite].protocol != first.suites[suite].protocol for suite in suites):
            differences.append(f"{name} and {first_name} were evaluated with different protocols")
        for suite in suites:
            if result.suites[suite].sha256 != first.suites[suite].sha256:
                differences.append(f"{name} and {first_name} have different examples in suite {suite}")
    return differences


def _changes(results: Mapping[str, Path | str], suites: Sequence[str]) -> dict[tuple[str, str], Change]:
    verdicts = {name: _shares(directory) for name, directory in results.items()}
    first = next(iter(verdicts.values()))
    changes: dict[tuple[str, str], Change] = {}
    for name, own in verdicts.items():
        for suite in suites:
            shared = [key for key in own if key[0] == suite and key in first]
            gained = sum(own[key] > first[key] for key in shared)
            lost = sum(own[key] < first[key] for key in shared)
            changes[name, suite] = Change(gained, lost)
    return changes


def _shares(directory: Path | str) -> dict[tuple[str, str], float]:
    """(suite, example) -> share of its completions that are right."""
    verdicts: dict[tuple[str, str], list[bool]] = {}
    for sample in read_samples(directory):
        verdicts.setdefault((sample["suite"], sample["id"]), []).append(bool(sample["correct"]))
    return {key: sum(own) / len(own) for key, own in verdicts.items()}


def _cell(figures: SuiteResult) -> str:
    low, high = figures.interval
    return f"{100 * figures.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub-flavoured table; bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
