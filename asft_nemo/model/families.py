"""The table of model families: one small module with a `traits(config)` each, and one row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from asft_nemo.errors import CheckpointError
from asft_nemo.model import llama, mistral, qwen2, qwen3
from asft_nemo.model.decoder import Traits, read_decoder
from asft_nemo.model.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: the family's name in this project.
        model_type: `model_type` of its Hugging Face config.json.
        architecture: the Hugging Face class that config.json must name.
        traits: from a config.json to what the family reads in a way of its own.
    """

    name: str
    model_type: str
    architecture: str
    traits: Callable[[Mapping[str, Any]], Traits]


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("qwen2", "qwen2", "Qwen2ForCausalLM", qwen2.traits),
        Family("qwen3", "qwen3", "Qwen3ForCausalLM", qwen3.traits),
        Family("llama", "llama", "LlamaForCausalLM", llama.traits),
        Family("mistral", "mistral", "MistralForCausalLM", mistral.traits),
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Returns the family of a Hugging Face config, by `model_type` and, where given, `architectures`.

    Raises:
        CheckpointError: no family matches; the message lists the known ones.
    """
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise CheckpointError(
            f"config.json: 'architectures' is {architectures!r} where a list is needed: take config.json from the original model"
        )
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
    family = family_of(config)
    return read_decoder(
        config, family=family.name, architecture=family.architecture, traits=family.traits(config)
    )
