"""Rows, settings and runs of the tests of prepared directories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from asft_nemo.config.schema import DataConfig, RunConfig, from_dict
from asft_nemo.data import PackedDataset, SupervisedDataset
from asft_nemo.data.preparation import Result, Suites, prepare_files

Writer = Callable[..., Path]
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "adds",
    "two",
    "numbers",
    "and",
    "writes",
    "the",
    "answer",
    "東京",
    "é",
    "42",
    "7",
]


def row(number: int) -> dict[str, str]:
    """Rows of different lengths."""
    return {
        "instruction": " ".join(WORDS[(number * 7 + i) % len(WORDS)] for i in range(1 + number % 13)),
        "response": " ".join(WORDS[(number * 5 + i) % len(WORDS)] for i in range(1 + number % 17)),
    }


ROWS = [row(number) for number in range(60)]
BAD = ["oops", {"instruction": "a"}, {"frage": "b"}]
TALK = {
    "messages": [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "The answer is 42."},
        {"role": "user", "content": "two numbers"},
        {"role": "assistant", "content": "The answer is 7."},
    ]
}


def made(
    model: Path,
    out: Path,
    *files: Path,
    workers: int = 1,
    suites: Suites | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    **data: Any,
) -> Result:
    return prepare_files(
        files,
        DataConfig(**data),
        tokenizer_dir=model,
        out=out,
        workers=workers,
        suites=suites,
        progress=progress,
    )


def run_of(model: Path, train: Sequence[Path], validation: Sequence[Path] = (), **data: Any) -> RunConfig:
    files = {"train": [str(file) for file in train], "validation": [str(file) for file in validation]}
    return from_dict(
        {
            "recipe": "test",
            "objective": {"name": "sft"},
            "reference": {"form": "none"},
            "peft": {"name": "none"},
            "cluster": {"name": "local"},
            "model": {"path": str(model)},
            "data": {"sequence_length": 64, "template": "raw", **files, **data},
            "trainer": {"global_batch_size": 4, "epochs": 2},
        }
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def assert_same_items(
    ours: SupervisedDataset | PackedDataset | None, theirs: SupervisedDataset | PackedDataset | None
) -> None:
    assert ours is not None
    assert theirs is not None
    assert len(ours) == len(theirs) > 0
    assert vars(ours.report) == vars(theirs.report)
    assert ours.sample_ids.tolist() == theirs.sample_ids.tolist()
    for index in (*range(len(ours)), -1):
        mine, other = ours[index], theirs[index]
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert value.dtype == other[name].dtype
            assert torch.equal(value, other[name]), (index, name)
