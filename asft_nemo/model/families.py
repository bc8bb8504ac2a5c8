"""The table of model families: one small module with a `read(config)` each, and one row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from asft_nemo.errors import CheckpointError
from asft_nemo.model import qwen2
from asft_nemo.model.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: the family's name in this project.
        model_type: `model_type` of its Hugging Face config.json.
        architecture: the Hugging Face class that config.json must name.
        read: from a config.json to a spec.
    """

    name: str
    model_type: str
    architecture: str
    read: Callable[[Mapping[str, Any]], ModelSpec]


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(name="qwen2", model_type="qwen2", architecture="Qwen2ForCausalLM", read=qwen2.read),
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Returns the family of a Hugging Face config, by `model_type` and, where given, `architectures`.

    Raises:
        CheckpointError: no family matches; the message lists the known ones.
    """
    model_type = config.get("model_type")
    architectures: list[str] = config.get("architectures") or []
    for family in FAMILIES.values():
        if family.model_type == model_type and (not architectures or family.architecture in architectures):
            return family
    known = ", ".join(
        f"{family.architecture} (model_type {family.model_type})" for family in FAMILIES.values()
    )
    raise CheckpointError(
        f"config.json: model_type={model_type!r} with architectures={architectures} is not a supported"
        " family:"
        f" choose a checkpoint of one of {known}"
    )


def model_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Returns the spec of a Hugging Face config of any known family.

    Raises:
        CheckpointError: the family is unknown, or a field is missing or malformed.
    """
    spec = family_of(config).read(config)
    if spec.num_attention_heads % spec.num_query_groups:
        raise CheckpointError(
            f"config.json: num_attention_heads={spec.num_attention_heads} is no multiple of"
            f" num_key_value_heads={spec.num_query_groups}: take config.json from the original model"
        )
    return spec
