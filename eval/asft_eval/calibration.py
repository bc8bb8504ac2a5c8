"""Whether a model is right as often as it is sure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from asft_eval.errors import EvaluationError

_BINS = 10


def calibration(
    confidence: Sequence[float] | Any, hit: Sequence[float] | Any, *, counted: str = "tokens"
) -> dict[str, Any]:
    """Expected calibration error over ten bins of equal width (Guo et al. 2017, eq. 3), and the bins.

    Args:
        confidence: probability of the most probable answer, `[N]`.
        hit: 1 where that answer is right, `[N]`.
        counted: what the N are; each bin says under this key how many it has.
    """
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(hit, dtype=np.float64)
    place = np.minimum((sure * _BINS).astype(np.int64), _BINS - 1)
    counts = np.bincount(place, minlength=_BINS)
    mean_sure = np.bincount(place, weights=sure, minlength=_BINS) / np.maximum(counts, 1)
    mean_right = np.bincount(place, weights=right, minlength=_BINS) / np.maximum(counts, 1)
    bins = [
        {
            "low": i / _BINS,
            "high": (i + 1) / _BINS,
            counted: int(counts[i]),
            "confidence": float(mean_sure[i]),
            "accuracy": float(mean_right[i]),
        }
        for i in range(_BINS)
    ]
    gaps = counts * np.abs(mean_sure - mean_right)
    return {"ece": float(gaps.sum() / counts.sum()), "bins": bins}


def of_choices(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`calibration` of a suite of multiple choice: how sure is the chosen letter's probability among the choices.

    Args:
        rows: its graded samples, with the log probabilities of the choices.
    """
    confidence = [_share_of_the_best(row["logprobs"]) for row in rows]
    return calibration(confidence, [bool(row["correct"]) for row in rows], counted="examples")


def _share_of_the_best(logprobs: Sequence[float]) -> float:
    """`1 / sum_c exp(l_c - max l)`; where no choice has any probability, none is likelier than another."""
    values = np.asarray(logprobs, dtype=np.float64)
    best = values.max()
    if np.isnan(best):
        raise EvaluationError(
            "a log probability of multiple choice is not a number (NaN): give a sound checkpoint"
        )
    return float(1 / np.exp(values - best).sum()) if np.isfinite(best) else 1 / len(values)
