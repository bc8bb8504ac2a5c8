"""Sizes of the models that recipes are made for, so that a run can be planned without their weights.

Each row holds what the model's own config.json on the Hugging Face hub says (main branch), in that file's words; what is left out is
what transformers' classes take then.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asft_nemo.config.recipes import recipe_model
from asft_nemo.config.schema import RunConfig
from asft_nemo.errors import ConfigError
from asft_nemo.model import read_model_spec
from asft_nemo.model.families import model_spec
from asft_nemo.model.spec import ModelSpec


def _decoder(
    layers: int, hidden: int, heads: int, groups: int, ffn: int, vocab: int, positions: int, **more: Any
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        **more,
    }


def _qwen2(*sizes: int, epsilon: float, **more: Any) -> dict[str, Any]:
    family = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6}
    # Published configurations name a window and switch it off.
    return _decoder(*sizes, **family, rms_norm_eps=epsilon, use_sliding_window=False, **more)


def _llama(*sizes: int, theta: float) -> dict[str, Any]:
    family = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
    return _decoder(*sizes, **family, rope_theta=theta)


#: hub id -> config.json. Columns: layers, hidden, heads, key/value heads, feed-forward, vocabulary, positions
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen2.5-1.5B": _qwen2(
        28, 1536, 12, 2, 8960, 151936, 131072, epsilon=1e-6, tie_word_embeddings=True
    ),
    "Qwen/Qwen2.5-7B": _qwen2(28, 3584, 28, 4, 18944, 152064, 131072, epsilon=1e-6),
    "Qwen/Qwen2.5-32B": _qwen2(64, 5120, 40, 8, 27648, 152064, 131072, epsilon=1e-5),
    "Qwen/Qwen2.5-72B": _qwen2(80, 8192, 64, 8, 29568, 152064, 131072, epsilon=1e-5),
    "meta-llama/Llama-2-7b-hf": _llama(32, 4096, 32, 32, 11008, 32000, 4096, theta=1e4),
    "meta-llama/Llama-2-70b-hf": _llama(80, 8192, 64, 8, 28672, 32000, 4096, theta=1e4),
    "meta-llama/Meta-Llama-3-8B": _llama(32, 4096, 32, 8, 14336, 128256, 8192, theta=5e5),
    "meta-llama/Meta-Llama-3-70B": _llama(80, 8192, 64, 8, 28672, 128256, 8192, theta=5e5),
}


def published_spec(hub_id: str) -> ModelSpec:
    """The architecture of a model of the table; raises KeyError for another."""
    return model_spec(PUBLISHED[hub_id])


def spec_of_recipe(recipe: str) -> ModelSpec | None:
    """The architecture of the model that a recipe is made for; None where it names none.

    Raises:
        ConfigError: no recipe has this name.
    """
    hub_id = recipe_model(recipe)
    return None if hub_id is None else published_spec(hub_id)


def source_of_sizes(run: RunConfig) -> str:
    """Where `spec_of_run` takes the sizes from, in words."""
    if Path(run.model.path).is_dir():
        return f"model.path={run.model.path}"
    return f"{recipe_model(run.recipe)} as published"


def spec_of_run(run: RunConfig) -> ModelSpec:
    """The architecture: of the directory at model.path where there is one, else of the model the recipe is made for.

    Raises:
        ConfigError: neither is there.
    """
    folder = Path(run.model.path)
    if folder.is_dir():
        return read_model_spec(folder / "context" / "hf" if (folder / "weights").is_dir() else folder)
    spec = spec_of_recipe(run.recipe)
    if spec is None:
        raise ConfigError(
            f"model.path={run.model.path} is not a directory, and recipe={run.recipe} names no published model: give a directory with a "
            "config.json"
        )
    return spec
