"""Measures one exported model with asft_eval: right or wrong on every test, and its drift from the base on held-out text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from asft_eval.backends import Options
from asft_eval.kl import Drift, measure_drift
from asft_eval.result import read_samples
from asft_eval.run import evaluate
from asft_eval.types import Suite

BATCH_SIZE = 128


@dataclass(frozen=True)
class Measured:
    """What one model did.

    Attributes:
        name: the model's, for example "asft_seed0" or "base".
        scores: suite -> 1.0 or 0.0 for every example, in the suite's order.
        drift: one measurement a block of held-out text.
    """

    name: str
    scores: Mapping[str, tuple[float, ...]]
    drift: tuple[Drift, ...]


def measure(
    model_dir: Path,
    base_dir: Path,
    *,
    suites: Sequence[Suite],
    blocks: Sequence[Sequence[tuple[str, str]]],
    max_tokens: int,
    out_dir: Path,
) -> Measured:
    """Greedy exact match on the suites and the drift on every block of text; loads the model with transformers.

    Args:
        model_dir: the Hugging Face model; its folder's name becomes the name.
        base_dir: the reference of the drift.
        suites: the tests.
        blocks: (prompt, response) texts in blocks of the same mixture.
        max_tokens: completions are cut after so many.
        out_dir: gets results.json, samples.jsonl, and drift.json with one object a block.
    """
    evaluate(
        model_dir,
        suites,
        backend="hf",
        out_dir=out_dir,
        max_tokens=max_tokens,
        options=Options(batch_size=BATCH_SIZE),
    )
    scores: dict[str, list[float]] = {suite.name: [] for suite in suites}
    for sample in read_samples(out_dir):
        scores[sample["suite"]].append(float(sample["correct"]))
    drift = tuple(measure_drift(model_dir, base_dir, block, batch_size=BATCH_SIZE) for block in blocks)
    (out_dir / "drift.json").write_text(json.dumps([asdict(block) for block in drift], indent=2) + "\n")
    return Measured(model_dir.name, {name: tuple(values) for name, values in scores.items()}, drift)
