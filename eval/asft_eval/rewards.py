"""The graders as rewards for reinforcement learning, in the forms that trainers call: 1 for a right answer, 0 for any other.

Verifiable: the verdict follows from the completion and the known answer alone, by the steps that `asft eval` judges with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asft_eval.graders import grade
from asft_eval.types import Example

Turns = Sequence[Mapping[str, str]]


def math_reward(completions: Sequence[str | Turns], answer: Sequence[str], **_: Any) -> list[float]:
    """TRL's form: a reward for every completion.

    Args:
        completions: what the model wrote; of a conversation its turns, the last of which counts.
        answer: the column `answer` of the rows, in the same order.
    """
    texts = [x if isinstance(x, str) else x[-1]["content"] for x in completions]
    pairs = [
        (Example(str(place), "", right), text)
        for place, (text, right) in enumerate(zip(texts, answer, strict=True))
    ]
    return [float(score.correct) for score in grade("math", pairs)]


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """verl's form (`custom_reward_function`): the reward of one completion; `data_source` and `extra_info` do not matter."""
    return math_reward([solution_str], [ground_truth])[0]
