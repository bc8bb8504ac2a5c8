"""A model to evaluate: assets/tiny-base where it is there, and a second, slightly different copy of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from asft_eval import EvaluationError
from asft_eval.graders.code import judge_program
from asft_eval.sandbox import Sandbox, open_sandbox
from contained import PROBLEM, RIGHT
from safetensors.torch import load_file, save_file

BASE = Path(__file__).resolve().parents[3] / "assets" / "tiny-base"


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The demo's base model."""
    assert BASE.is_dir(), "assets/tiny-base is part of the repository"
    return BASE


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that passes for a model as long as nobody loads it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(scope="session")
def moved_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with a little seeded noise on every weight, in fp32."""
    folder = tmp_path_factory.mktemp("moved")
    shutil.copytree(model_dir, folder, dirs_exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    noisy = {k: v.float() + 0.05 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The machine is shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One that all tests of a file try to break; it must still judge when they are done."""
    try:
        opened = open_sandbox()
    except EvaluationError as error:
        pytest.skip(str(error))
    with opened:
        yield opened
        assert judge_program(opened, PROBLEM, RIGHT) == (True, "all tests passed (2 calls)")
