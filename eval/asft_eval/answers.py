"""What every example of a finished evaluation scored, read out of `samples.jsonl`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from asft_eval.errors import EvaluationError
from asft_eval.result import SAMPLES, Result, each_sample
from asft_eval.scoring import example_score


@dataclass(frozen=True, slots=True)
class Answers:
    """One result's examples.

    Attributes:
        scores: suite -> example -> share of right completions, or pass@k; in the suite's order.
        prompts: suite -> hash over ids and prompts, as the model was given them.
    """

    scores: Mapping[str, Mapping[str, float]]
    prompts: Mapping[str, str]


def read_answers(directory: Path | str, result: Result) -> Answers:
    """The examples of a result.

    Raises:
        EvaluationError: `samples.jsonl` is missing, damaged, or does not hold each completion of `results.json` once.
    """
    right: dict[str, dict[str, int]] = {suite: {} for suite in result.suites}
    seen: dict[str, set[tuple[str, int]]] = {suite: set() for suite in result.suites}
    texts = {suite: hashlib.sha256() for suite in result.suites}
    for sample in each_sample(directory):
        suite, example = sample["suite"], str(sample["id"])
        if suite in result.for_judge and suite not in result.suites:
            continue  # it awaits a judge and is not compared
        if suite not in right or "correct" not in sample:
            raise EvaluationError(f"{directory} is not finished: evaluate with this directory as --out again")
        if example not in right[suite]:
            texts[suite].update(f"{example}\n{sample['prompt']}\n".encode("utf-8", "surrogatepass"))
        right[suite][example] = right[suite].get(example, 0) + bool(sample["correct"])
        if (example, sample["sample"]) in seen[suite]:
            raise EvaluationError(
                f"{Path(directory) / SAMPLES} has completion {sample['sample'] + 1} of {suite}:{example} twice: evaluate with this directory as --out again"
            )
        seen[suite].add((example, sample["sample"]))
    scores: dict[str, dict[str, float]] = {}
    for suite, figures in result.suites.items():
        expected = figures.n * figures.protocol.n
        if (len(right[suite]), len(seen[suite])) != (figures.n, expected):
            raise EvaluationError(
                f"{Path(directory) / SAMPLES} has {len(seen[suite])} completions of suite {suite}, {expected} were graded: "
                "evaluate with this directory as --out again"
            )
        scores[suite] = {id_: example_score(figures.protocol, count) for id_, count in right[suite].items()}
    return Answers(scores, {suite: text.hexdigest() for suite, text in texts.items()})
