"""Measured models that no model made: chosen shares of right answers and chosen drifts."""

from __future__ import annotations

import random
from collections.abc import Mapping

from asft_eval.kl import Drift

from asft_nemo.demo.figures import Group
from asft_nemo.demo.measure import Measured

NEW, OLD = "swap", ("copy", "add")
N = 200


def model(name: str, *, new: float, old: float, kl: float, seed: int = 0) -> Measured:
    """A model that is right on the given shares of `N` tests a skill, spread at random."""
    rng = random.Random(f"{name} {seed}")

    def scores(share: float) -> tuple[float, ...]:
        right = round(share * N)
        values = [1.0] * right + [0.0] * (N - right)
        rng.shuffle(values)
        return tuple(values)

    drift = tuple(
        Drift(kl * (1 + 0.05 * i), 2 * kl * (1 + 0.05 * i), 0.9, 0.5, num_tokens=100 + i, num_texts=10)
        for i in range(4)
    )
    return Measured(name, {NEW: scores(new), **{skill: scores(old) for skill in OLD}}, drift)


def group(name: str, *, seeds: int = 1, **shares: float) -> Group:
    """A group of made-up models."""
    return Group(name, tuple(model(name, seed=i, **shares) for i in range(seeds)), NEW, OLD)


def groups(**changes: Mapping[str, float]) -> dict[str, Group]:
    """Base, sft and asft as the paper would have them, unless changed: `groups(asft={"old": 0.5})`."""
    shares = {
        "base": {"new": 0.5, "old": 0.98, "kl": 0.0},
        "sft": {"new": 0.85, "old": 0.7, "kl": 0.2},
        "asft": {"new": 0.9, "old": 0.9, "kl": 0.05},
    }
    return {
        name: group(name, seeds=1 if name == "base" else 2, **{**values, **changes.get(name, {})})
        for name, values in shares.items()
    }
