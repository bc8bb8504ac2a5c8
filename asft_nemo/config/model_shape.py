"""The few numbers of a model that the rules need, read from its config.json; nothing heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    attention_window: int | None = None  # see the function of that name
    head_dim: int | None = None  # channels of a head where they are not hidden_size / num_attention_heads

    @property
    def head_channels(self) -> int:
        """Channels of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


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

# model types whose layers may attend to a window -> the switch in config.json that turns it on; None: there is no switch, it is on
_WINDOW_SWITCHES: dict[str, str | None] = {
    "mistral": None,
    "qwen2": "use_sliding_window",
    "qwen3": "use_sliding_window",
}
# what transformers' classes take where config.json does not say
_ABSENT_WINDOW, _ABSENT_MAX_WINDOW_LAYERS = 4096, 28

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
    return ModelShape(
        **sizes, attention_window=attention_window(values), head_dim=_own_head_dim(values, sizes)
    )


def _own_head_dim(values: Mapping[str, Any], sizes: Mapping[str, int]) -> int | None:
    """Channels of a head where config.json says other than what follows from the other sizes, as Qwen3's may."""
    stated = values.get("head_dim")
    follows = (
        sizes["num_attention_heads"] * stated == sizes["hidden_size"] if isinstance(stated, int) else True
    )
    return None if follows else stated


def attention_window(values: Mapping[str, Any]) -> int | None:
    """How many tokens, itself included, a token attends to in some layer; None where no layer is limited.

    Args:
        values: a parsed config.json. Published models often state a window and switch it off.

    Raises:
        ConfigError: the window is no positive number of tokens.
    """
    model_type = values.get("model_type")
    if model_type not in _WINDOW_SWITCHES:
        return None
    window, switch = values.get("sliding_window", _ABSENT_WINDOW), _WINDOW_SWITCHES[model_type]
    if window is None or (switch is not None and not _windowed_layers(values, switch)):
        return None
    if isinstance(window, bool) or not isinstance(window, int) or window <= 0:
        raise ConfigError(
            f"config.json: sliding_window={window!r} is no number of tokens: take config.json from the original model"
        )
    return window


def _windowed_layers(values: Mapping[str, Any], switch: str) -> bool:
    """Whether the switch is on and some layer is windowed: those in the list, or those from `max_window_layers` on."""
    if values.get(switch, False) is not True:
        return False
    if values.get("layer_types") is not None:
        return "sliding_attention" in values["layer_types"]
    first = values.get("max_window_layers", _ABSENT_MAX_WINDOW_LAYERS)
    return not isinstance(first, int) or first < values["num_hidden_layers"]
