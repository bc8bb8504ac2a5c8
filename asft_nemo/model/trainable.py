"""Which models Megatron computes exactly as transformers does, and its arguments for their rotary embeddings.

Conversion asks for none of this: any model of a known family converts, whether it can be trained or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from asft_nemo.errors import UserError
from asft_nemo.model.spec import ModelSpec

# Constants of `RotaryEmbedding._apply_scaling` in Megatron-core 0.15.3, which no argument reaches.
_LLAMA3_CONSTANTS = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}
_SILU = ("silu", "swish")  # two names of one function


def check_trainable(spec: ModelSpec) -> None:
    """Checks that the training stack computes what transformers computes for this model.

    The sliding window is not looked at: it matters only for sequences longer than it, and
    `asft_nemo.config.rules` refuses those.

    Raises:
        UserError: it does not; the sentence names the field of config.json.
    """
    if spec.hidden_act not in _SILU:
        raise UserError(
            f"config.json: hidden_act={spec.hidden_act!r} can be converted, but not trained: train a model whose"
            " hidden_act is 'silu'"
        )
    if spec.output_bias or spec.mlp_bias:
        fields = [name for name, given in _bias_fields(spec) if given]
        raise UserError(
            f"config.json: {' and '.join(f'{name}=true' for name in fields)} can be converted, but not trained:"
            " train a model without these biases"
        )
    rope_kwargs(spec)


def rope_kwargs(spec: ModelSpec) -> dict[str, Any]:
    """Returns the arguments of Megatron's `GPTModel` for the model's rope scaling.

    Raises:
        UserError: Megatron has none for this kind of scaling, or not with these values.
    """
    arguments = {"seq_len_interpolation_factor": None, "rope_scaling": False, "rope_scaling_factor": 1.0}
    if spec.rope_scaling is None:
        return arguments
    kind = spec.rope_scaling["rope_type"]
    if kind not in _ROPE_SCALINGS:
        raise UserError(
            f"config.json: rope scaling of type {kind!r} can be converted, but not trained (only"
            f" {', '.join(_ROPE_SCALINGS)} can): set rope_scaling to null and train within the unscaled context"
        )
    return arguments | _ROPE_SCALINGS[kind](spec.rope_scaling)


def _linear(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Positions divided by the factor, which transformers divides the frequencies by: the same angles for powers of two only."""
    factor = _factor(scaling)
    if math.frexp(factor)[0] != 0.5:
        raise UserError(
            f"config.json: linear rope scaling with factor={factor:g} can be converted, but not trained: Megatron rounds its"
            " angles in another way unless the factor is a power of two"
        )
    return {"seq_len_interpolation_factor": factor}


def _llama3(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Long wavelengths divided by the factor, short ones kept, a smooth passage between."""
    other = {
        name: scaling.get(name) for name, value in _LLAMA3_CONSTANTS.items() if scaling.get(name) != value
    }
    if other:
        raise UserError(
            f"config.json: llama3 rope scaling with {_shown(other)} can be converted, but not trained: Megatron computes it"
            f" with {_shown({name: _LLAMA3_CONSTANTS[name] for name in other})} only"
        )
    return {"rope_scaling": True, "rope_scaling_factor": _factor(scaling)}


_ROPE_SCALINGS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "linear": _linear,
    "llama3": _llama3,
}


def _factor(scaling: Mapping[str, Any]) -> float:
    factor = scaling.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1:
        raise UserError(
            f"config.json: the rope scaling's factor is {factor!r} where a number of at least 1 is needed: take"
            " config.json from the original model"
        )
    return float(factor)


def _bias_fields(spec: ModelSpec) -> tuple[tuple[str, bool], ...]:
    return ("attention_bias", spec.output_bias), ("mlp_bias", spec.mlp_bias)


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
