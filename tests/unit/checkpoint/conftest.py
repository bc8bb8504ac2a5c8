"""Small random Hugging Face checkpoints on disk, written by the safetensors library itself."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _nothing_left_beside(tmp_path):
    """Whatever a test does, no half-written directory may stay."""
    yield
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]


@pytest.fixture
def edit_config():
    def edit(directory: Path, **changes):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        (directory.parent.parent / "seal.json").unlink(missing_ok=True)  # of a checkpoint: changed on purpose

    return edit
