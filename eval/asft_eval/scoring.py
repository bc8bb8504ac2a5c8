"""From graded completions to a suite's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from asft_eval.calibration import of_choices
from asft_eval.protocols import pass_at_k
from asft_eval.requests import Part
from asft_eval.result import SuiteResult
from asft_eval.statistics import standard_error, wilson_interval
from asft_eval.types import Protocol


def figures(part: Part, rows: Sequence[Mapping[str, Any]], *, backend: str) -> SuiteResult:
    """The figures of one suite under one protocol.

    Args:
        part: the suite and the protocol.
        rows: every graded completion, those of one example beside each other.
        backend: name of what answered.
    """
    suite, how = part.suite, part.protocol
    right = [sum(bool(row["correct"]) for row in rows[i : i + how.n]) for i in range(0, len(rows), how.n)]
    scores = [example_score(how, r) for r in right]
    accuracy, stderr, interval = _mean(scores) if how.n > 1 else _share(sum(right), len(right))
    return SuiteResult(
        version=suite.version,
        sha256=suite.sha256,
        grader=suite.grader,
        prompt=suite.prompt,
        protocol=how,
        backend=backend,
        n=len(suite.examples),
        right=sum(right),
        accuracy=accuracy,
        stderr=stderr,
        interval=interval,
        tokens=sum(int(row["num_tokens"]) for row in rows),
        cut=sum(not row["finished"] for row in rows),
        seconds=sum(float(row["seconds"]) for row in rows),
        calibration=of_choices(rows) if suite.choices else None,
    )


def example_score(how: Protocol, right: int) -> float:
    """What one example counts: the share of its `how.n` completions that are right, or pass@k."""
    return pass_at_k(right, how.n, how.k) if how.k else right / how.n


def _share(right: int, n: int) -> tuple[float, float, tuple[float, float]]:
    return right / n, standard_error(right, n), wilson_interval(right, n)


def _mean(scores: Sequence[float]) -> tuple[float, float, tuple[float, float]]:
    """Mean, its standard error over examples, and Wilson's interval at the number of coin tosses of that error.

    Completions of one example are not independent, so examples are what is counted: the standard error is that of the mean of
    their scores (with n - 1), and the interval is the one that as many independent tosses as give this error would have.
    """
    n = len(scores)
    mean = sum(scores) / n
    variance = sum((score - mean) ** 2 for score in scores) / max(n - 1, 1) / n
    tosses = min(mean * (1 - mean) / variance, 1e12) if variance > 0 else float(n)
    return mean, math.sqrt(variance), wilson_interval(mean * tosses, tosses)
