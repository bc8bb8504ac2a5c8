"""Whether results were measured alike: only then is a difference the models' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from asft_eval.answers import Answers
from asft_eval.result import Result, SuiteResult


def unlike(results: Mapping[str, Result], answers: Mapping[str, Answers], suites: Sequence[str]) -> list[str]:
    """What was not the same for the first result and the others, a clause each; seeds and backends may differ.

    Args:
        results: name -> result.
        answers: name -> its graded completions.
        suites: those that all results have.
    """
    first_name, *others = results
    first = results[first_name]
    found: list[str] = []
    for name in others:
        both, one = f"{name} and {first_name}", results[name]
        if any(_how(one.suites[suite]) != _how(first.suites[suite]) for suite in suites):
            found.append(f"{both} were evaluated with different protocols")
        for suite in suites:
            what = _suite(one.suites[suite], first.suites[suite], suite)
            if not what and answers[name].prompts[suite] != answers[first_name].prompts[suite]:
                what = f"were given suite {suite} in other words (another chat template)"
            found += [f"{both} {what}"] if what else []
        found += [f"{both} {what}" for what in _drift(one.drift, first.drift)]
    return found


def _how(figures: SuiteResult) -> Any:
    """Two draws of one protocol are alike, so the seed is no part of it."""
    return replace(figures.protocol, seed=None)


def _suite(one: SuiteResult, other: SuiteResult, suite: str) -> str:
    if one.sha256 == other.sha256:
        return ""
    for what, values in (
        ("versions", (one.version, other.version)),
        ("prompts", (one.prompt, other.prompt)),
        ("graders", (one.grader, other.grader)),
    ):
        if values[0] != values[1]:
            return f"have different {what} of suite {suite} ({values[0]}, {values[1]})"
    return f"have different examples in suite {suite}"


def _drift(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> list[str]:
    if one is None or other is None:
        return []
    found: list[str] = []
    if one["text"]["sha256"] != other["text"]["sha256"]:
        found.append("measured their drift on different texts")
    bases = [drift["base"]["fingerprint"] for drift in (one, other) if drift["base"] is not None]
    if len(set(bases)) > 1:
        found.append("measured their drift from different bases")
    dtypes = [drift.get("dtype", "float32") for drift in (one, other)]  # files from before the key are fp32
    if len(set(dtypes)) > 1:
        found.append(f"measured their drift in different dtypes ({', '.join(dtypes)})")
    return found
