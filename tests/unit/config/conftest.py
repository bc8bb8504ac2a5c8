"""A model directory with nothing but a config.json, a data file, and a compose that knows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sentences import sentences

from asft_nemo.config.load import compose
from asft_nemo.config.schema import RunConfig

SHAPE = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return folder


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "response": "b"}\n')
    return path


@pytest.fixture
def configure(tmp_path: Path, model_dir: Path, data_file: Path) -> Callable[..., RunConfig]:
    """Composes tiny_cpu with the fixtures' model, data and a fresh run.dir, and the given overrides."""

    def call(*overrides: str) -> RunConfig:
        base = [
            "recipe=tiny_cpu",
            f"model.path={model_dir}",
            f"data.train=[{data_file}]",
            f"run.dir={tmp_path / 'run'}",
        ]
        return compose([*base, *overrides])

    return call


@pytest.fixture
def violations(configure: Callable[..., RunConfig]) -> Callable[..., tuple[str, ...]]:
    """The sentences that overrides lead to; none when they are fine."""

    def call(*overrides: str) -> tuple[str, ...]:
        return sentences(lambda: configure(*overrides))

    return call
