"""From a Hugging Face directory to a spec, and from a spec to the arguments of Megatron's configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from asft_nemo.errors import CheckpointError
from asft_nemo.model.families import family_of, model_spec
from asft_nemo.model.spec import ModelSpec
from asft_nemo.model.trainable import check_trainable, rope_kwargs

__all__ = [
    "ModelSpec",
    "megatron_config_kwargs",
    "padded_vocab_size",
    "parameter_count",
    "read_hf_config",
    "read_model_spec",
]


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """Returns the parsed `config.json` of a Hugging Face checkpoint of a known family.

    Raises:
        CheckpointError: the directory or its config.json is missing, it is no JSON object, or the family is
            unknown.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: give the path of a Hugging Face checkpoint")
    path = directory / "config.json"
    if not path.is_file():
        hint = ""
        if (directory / "weights").is_dir():
            hint = " (this looks like a NeMo checkpoint, whose Hugging Face files are in context/hf)"
        raise CheckpointError(
            f"{directory} holds no config.json{hint}: give the path of a Hugging Face checkpoint directory"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): fetch the file again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object: fetch the file again")
    family_of(config)
    return config


def read_model_spec(directory: str | Path) -> ModelSpec:
    """Returns the spec of a Hugging Face checkpoint directory; raises as its two parts do."""
    return model_spec(read_hf_config(directory))


def megatron_config_kwargs(spec: ModelSpec) -> dict[str, Any]:
    """Returns the keyword arguments of our `GPTConfig` that the architecture decides.

    What the run decides is left to the caller: layout, precision, `seq_length` (which must fit
    `spec.attention_window`: `asft_nemo.config.rules` checks it), fusions, the layer spec, and `vocab_size`,
    which must be given too, as `padded_vocab_size(spec.vocab_size, tp_size=...)`, since NeMo takes it as it
    is.

    Raises:
        UserError: the training stack cannot compute this model exactly.
    """
    import torch.nn.functional as F

    check_trainable(spec)
    return {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_query_groups": spec.num_query_groups,
        "kv_channels": spec.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": spec.norm_epsilon,
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": spec.qkv_bias,
        "qk_layernorm": spec.qk_norm,
        "position_embedding_type": "rope",
        "rotary_base": spec.rope_theta,
        "rotary_percent": 1.0,
        **rope_kwargs(spec),
        "share_embeddings_and_output_weights": spec.tie_word_embeddings,
        "hidden_dropout": 0.0,
        "attention_dropout": spec.attention_dropout,
        "init_method_std": spec.initializer_range,
    }


def padded_vocab_size(vocab_size: int, *, tp_size: int, divisible_by: int = 128) -> int:
    """Returns the vocabulary rounded up to a multiple of `divisible_by * tp_size`, as Megatron pads it."""
    multiple = divisible_by * tp_size
    return -(-vocab_size // multiple) * multiple


def parameter_count(spec: ModelSpec) -> int:
    """Returns the number of parameters, without vocabulary padding and counting tied embeddings once."""
    qkv_rows = spec.query_rows + 2 * spec.key_value_rows
    attention = spec.hidden_size * (qkv_rows + spec.query_rows) + qkv_rows * spec.qkv_bias
    attention += 2 * spec.head_dim * spec.qk_norm + spec.hidden_size * spec.output_bias
    mlp = 3 * spec.hidden_size * spec.ffn_hidden_size
    mlp += (2 * spec.ffn_hidden_size + spec.hidden_size) * spec.mlp_bias
    norms = 2 * spec.hidden_size
    embeddings = spec.vocab_size * spec.hidden_size * (1 if spec.tie_word_embeddings else 2)
    return spec.num_layers * (attention + mlp + norms) + spec.hidden_size + embeddings
