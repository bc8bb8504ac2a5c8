"""Runs to plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from asft_nemo.config.schema import RunConfig, from_dict, replace

Settle = Callable[..., RunConfig]


@pytest.fixture
def settle() -> Settle:
    """A run of plain supervised fine-tuning with some dotted settings changed."""

    def call(**changes: Any) -> RunConfig:
        base = from_dict(
            {
                "recipe": "tiny_cpu",
                "objective": {"name": "sft"},
                "reference": {"form": "none"},
                "peft": {"name": "none"},
                "model": {"path": "nowhere"},
                "cluster": {"name": "local"},
            }
        )
        return replace(
            base, {"run.world_size": "???", **{k.replace("__", "."): v for k, v in changes.items()}}
        )

    return call
