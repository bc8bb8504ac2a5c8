"""What the tests with real NeMo ranks share."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import make_model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random Qwen2 with tied and one with untied embeddings; nobody writes into their folders."""
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, tied=name == "tied") for name in ("tied", "untied")}


@pytest.fixture(scope="session")
def model(models: dict[str, Path]) -> Path:
    """The one with untied embeddings."""
    return models["untied"]
