"""Which layers the model is made of: Transformer Engine's where it is installed and a GPU is there, Megatron's local ones elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from asft_nemo.config.machine import version_of
from asft_nemo.cpu import backend
from asft_nemo.cpu.norm import RMSNorm
from asft_nemo.nemo.biased_linear import BiasedColumnParallelLinear
from asft_nemo.nemo.context_parallel import GatheredAttention

_local_for: str | None = None  # why this process takes no layers of Transformer Engine


def choose_layers(asked: str, precision: str) -> None:
    """Says what every model that this process builds from here on is made for.

    fp32 takes Megatron's own layers: Transformer Engine multiplies fp32 as TF32, whose products have three digits, and has no attention in fp32
    for packed rows. Nor may torch multiply so then, which NVIDIA's images let it.

    Args:
        asked: `kernels.layers`, ``auto`` or ``local``.
        precision: of the run.
    """
    global _local_for
    _local_for = None
    if asked == "local":
        _local_for = "kernels.layers=local"
    if precision == "fp32":
        _local_for = _local_for or "precision=fp32"
        torch.set_float32_matmul_precision("highest")


def uses_transformer_engine() -> bool:
    """Whether Transformer Engine's layers are used in this process."""
    if _local_for is not None or backend.active():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def kernels_line() -> str:
    """Which layers and which Adam this process uses, and why not the fused ones; `asft doctor` says it of a machine."""
    from megatron.core import optimizer

    if uses_transformer_engine():
        layers = f"Transformer Engine {version_of('transformer-engine') or ''}".rstrip()
    else:
        layers = f"Megatron's local ones ({_why_local()})"
    adam = optimizer.Adam
    return f"layers: {layers}; Adam: {adam.__module__.partition('.')[0]}'s {adam.__name__}"


def _why_local() -> str:
    if backend.active():
        return "CPU ranks"
    return _local_for or "no Transformer Engine"


def layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """The layer specification for `config`; a function at module level because NeMo stores it in the config.

    Args:
        config: the GPTConfig of the model.
        vp_stage: virtual pipeline stage, which decides how many layers this chunk has.
    """
    if uses_transformer_engine():
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.linear_qkv = BiasedColumnParallelLinear
    if config.qk_layernorm:
        spec.submodules.self_attention.submodules.q_layernorm = RMSNorm
        spec.submodules.self_attention.submodules.k_layernorm = RMSNorm
    if config.context_parallel_size > 1:
        spec.submodules.self_attention.submodules.core_attention = GatheredAttention
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)  # type: ignore[arg-type]
