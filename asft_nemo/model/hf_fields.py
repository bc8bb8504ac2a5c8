"""Reading typed fields from a Hugging Face config, with an error that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asft_nemo.errors import CheckpointError


def required_int(config: Mapping[str, Any], key: str) -> int:
    """Returns a positive integer field; raises `CheckpointError` when it is missing or something else."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        found = "is missing" if key not in config else f"is {value!r}"
        raise CheckpointError(
            f"config.json: '{key}' {found} where a positive integer is needed: take config.json from the"
            " original model"
        )
    return value


def optional_number(config: Mapping[str, Any], key: str, absent: float) -> float:
    """Returns a numeric field, or `absent`, what Hugging Face's own class takes when it is not written."""
    value = config.get(key, absent)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(
            f"config.json: '{key}' is {value!r} where a number is needed: correct that field"
        )
    return float(value)


def optional_bool(config: Mapping[str, Any], key: str, absent: bool) -> bool:
    """Returns a boolean field, or `absent`, what Hugging Face's own class takes when it is not written."""
    value = config.get(key, absent)
    if not isinstance(value, bool):
        raise CheckpointError(
            f"config.json: '{key}' is {value!r} where true or false is needed: correct that field"
        )
    return value


def optional_text(config: Mapping[str, Any], key: str, absent: str) -> str:
    """Returns a text field, or `absent`, what Hugging Face's own class takes when it is not written."""
    value = config.get(key, absent)
    if not isinstance(value, str):
        raise CheckpointError(f"config.json: '{key}' is {value!r} where a text is needed: correct that field")
    return value


def query_groups(config: Mapping[str, Any], *, absent: str = "num_key_value_heads") -> int:
    """Returns the number of key/value heads: the field, the number of query heads where it is null.

    Args:
        config: the parsed config.json.
        absent: the field that stands in where it is not written at all; by default none does.
    """
    key = absent if "num_key_value_heads" not in config else "num_key_value_heads"
    return required_int(config, "num_attention_heads" if config.get(key, "") is None else key)


def head_dim(config: Mapping[str, Any]) -> int:
    """Returns channels per head: the field when present, else hidden_size / num_attention_heads."""
    if config.get("head_dim") is not None:
        return required_int(config, "head_dim")
    hidden_size, heads = required_int(config, "hidden_size"), required_int(config, "num_attention_heads")
    if hidden_size % heads:
        raise CheckpointError(
            f"config.json: hidden_size={hidden_size} is no multiple of num_attention_heads={heads} and there"
            " is no"
            " 'head_dim': take config.json from the original model"
        )
    return hidden_size // heads


def rope(config: Mapping[str, Any], absent_theta: float) -> tuple[float, dict[str, Any] | None]:
    """Returns (rope theta, rope scaling or None).

    Both spellings are read: `rope_theta` beside `rope_scaling`, and `rope_parameters`, which holds the two
    together. A scaling of type "default" is no scaling.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise CheckpointError(
                f"config.json: '{key}' is {config[key]!r} where an object or null is needed: take config.json from the original model"
            )
    together: Mapping[str, Any] = config.get("rope_parameters") or {}
    theta = optional_number({**config, **together}, "rope_theta", absent_theta)
    scaling = dict(together or config.get("rope_scaling") or {})
    scaling.pop("rope_theta", None)
    rope_type = scaling.pop("rope_type", scaling.pop("type", "default"))
    return theta, None if rope_type == "default" else {"rope_type": rope_type, **scaling}
