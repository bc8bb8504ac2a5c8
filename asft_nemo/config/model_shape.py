"""The few numbers of a model that the rules need, read from its config.json; nothing heavy is imported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from asft_nemo.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only model, as its Hugging Face config.json states them."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    ffn_hidden_size: int
    vocab_size: int
    max_positions: int


# our name -> names in config.json, the first present counts
_KEYS = {
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_query_groups": ("num_key_value_heads", "num_attention_heads"),
    "ffn_hidden_size": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
    "max_positions": ("max_position_embeddings",),
}

# A NeMo checkpoint carries the original Hugging Face files in context/hf.
_PLACES = ("config.json", "context/hf/config.json")


def read_model_shape(path: str | Path) -> ModelShape:
    """The shape of the model in a directory.

    Args:
        path: Hugging Face directory, or a checkpoint that carries the Hugging Face config.json.

    Raises:
        ConfigError: the directory, its config.json or a size in it is missing or unreadable.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"model.path={path} is not a directory: give a Hugging Face model directory or a checkpoint"
        )
    file = next((folder / place for place in _PLACES if (folder / place).is_file()), None)
    if file is None:
        raise ConfigError(
            f"model.path={path} has no config.json: give a Hugging Face model directory or a checkpoint"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read as JSON ({error}): download or export the model again"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is not a JSON object: download or export the model again")
    sizes: dict[str, int] = {}
    for name, keys in _KEYS.items():
        found = next((values[key] for key in keys if isinstance(values.get(key), int)), None)
        if found is None:
            raise ConfigError(f"{file} has no {keys[0]}: the model is not a decoder this project knows")
        sizes[name] = found
    return ModelShape(**sizes)
