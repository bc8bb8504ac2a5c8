"""Model families: from a Hugging Face `config.json` to plain values and Megatron's keyword arguments.

Nothing here imports megatron or nemo; `megatron_config_kwargs` imports torch when it is called.
"""

from __future__ import annotations

from asft_nemo.model.config import (
    ModelSpec,
    megatron_config_kwargs,
    padded_vocab_size,
    parameter_count,
    read_hf_config,
    read_model_spec,
)
from asft_nemo.model.families import FAMILIES, Family, family_of, model_spec
from asft_nemo.model.trainable import check_trainable

__all__ = [
    "FAMILIES",
    "Family",
    "ModelSpec",
    "check_trainable",
    "family_of",
    "megatron_config_kwargs",
    "model_spec",
    "padded_vocab_size",
    "parameter_count",
    "read_hf_config",
    "read_model_spec",
]
