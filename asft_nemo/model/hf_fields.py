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
    together. A scaling of type "default" is no scaling. Where a config.json holds both, transformers 4 reads
    the first, transformers 5 now one and now the other: they must say the same.
    """
    thetas, scalings = ([config["rope_theta"]] if "rope_theta" in config else []), []
    for key in ("rope_parameters", "rope_scaling"):
        given = config.get(key) or {}
        if not isinstance(given, Mapping):
            raise CheckpointError(
                f"config.json: '{key}' is {config[key]!r} where an object or null is needed: take config.json from the original model"
            )
        scaling = dict(given)
        if "rope_theta" in scaling:
            thetas.append(scaling.pop("rope_theta"))
        kinds = [scaling.pop(name) for name in ("rope_type", "type") if name in scaling]
        if any(kind != kinds[0] for kind in kinds):
            raise _contradiction(f"'{key}' is of the types {kinds[0]!r} and {kinds[1]!r}")
        if given:
            scalings.append({"rope_type": kinds[0] if kinds else "default", **scaling})
    if any(theta != thetas[0] for theta in thetas):
        raise _contradiction(f"rope_theta is {' and '.join(map(repr, thetas))}")
    if any(scaling != scalings[0] for scaling in scalings):
        raise _contradiction("'rope_parameters' and 'rope_scaling' are two different scalings")
    theta = optional_number({"rope_theta": thetas[0]} if thetas else {}, "rope_theta", absent_theta)
    scaled = bool(scalings) and scalings[0]["rope_type"] != "default"
    return theta, scalings[0] if scaled else None


def _contradiction(what: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: {what}, and programs differ in which of them they read: leave the one that the model was trained with"
    )
