"""Examples that a model gained or lost against the first one, with what both wrote: for a reader, who trusts no table alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asft_eval.compare import Comparison
from asft_eval.result import each_sample

MOST = 3
"""Examples gained, and as many lost, of a model and a suite."""
_SHOWN = 900
"""Characters of a text's end that are kept: the question and the answer stand there."""

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Written:
    """One completion and its verdict, as in `samples.jsonl`; texts are cut to their ends."""

    completion: str
    parsed: str
    reason: str
    correct: bool


@dataclass(frozen=True, slots=True)
class Told:
    """One example that changed.

    Attributes:
        model: the one that gained or lost it.
        suite, id: the example.
        difference: its score minus the first model's.
        prompt, answer: what was asked, and what is right.
        first: a completion of the first model; of several the first that shows the change.
        own: one of `model`.
    """

    model: str
    suite: str
    id: str
    difference: float
    prompt: str
    answer: str
    first: Written
    own: Written


def told(comparison: Comparison, results: Mapping[str, Path | str]) -> list[Told]:
    """Up to `MOST` examples gained and lost of each model and suite, those that changed most first.

    Args:
        comparison: of these results.
        results: name -> directory, as given to `compare`.
    """
    chosen = {name: _chosen(gaps) for name, gaps in comparison.gaps.items()}
    first, *others = results
    wanted = {key: 0.0 for picked in chosen.values() for key in picked}
    # Of the first model a wrong completion shows a gain, a right one a loss, so both are kept.
    known = _rows(results[first], wanted)
    found: list[Told] = []
    for name in others:
        own = _rows(results[name], chosen[name])
        for key, gap in chosen[name].items():
            before, after = _pick(known[key], right=gap < 0), _pick(own[key], right=gap > 0)
            found.append(
                Told(
                    model=name,
                    suite=key[0],
                    id=key[1],
                    difference=gap,
                    prompt=_end(after["prompt"]),
                    answer=_end(after["answer"]),
                    first=_written(before),
                    own=_written(after),
                )
            )
    return found


def _chosen(gaps: Mapping[str, Mapping[str, float]]) -> dict[Key, float]:
    found: dict[Key, float] = {}
    for suite, own in gaps.items():
        order = sorted((example for example in own if own[example] != 0), key=lambda x: -abs(own[x]))
        for gained in (True, False):
            picked = [example for example in order if (own[example] > 0) == gained][:MOST]
            found.update(((suite, example), own[example]) for example in picked)
    return found


def _rows(directory: Path | str, wanted: Mapping[Key, float]) -> dict[Key, list[dict[str, Any]]]:
    """Of every wanted example one right and one wrong completion, where it has them."""
    found: dict[Key, list[dict[str, Any]]] = {}
    for sample in each_sample(directory):
        key = (sample["suite"], str(sample["id"]))
        if key not in wanted:
            continue
        rows = found.setdefault(key, [])
        if all(bool(row["correct"]) != bool(sample["correct"]) for row in rows):
            rows.append(sample)
    return found


def _pick(rows: Sequence[dict[str, Any]], *, right: bool) -> dict[str, Any]:
    return next((row for row in rows if bool(row["correct"]) == right), rows[0])


def _written(row: Mapping[str, Any]) -> Written:
    return Written(
        _end(row["completion"]), _end(str(row["parsed"])), _end(str(row["reason"])), bool(row["correct"])
    )


def _end(text: str) -> str:
    return text if len(text) <= _SHOWN else f"[…] {text[-_SHOWN:]}"
