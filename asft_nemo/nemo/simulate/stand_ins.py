"""What Transformer Engine's layers keep for backward, made of layers that need neither it nor a GPU.

Only bytes are right here: outputs have the right shape and hold nothing. What each stand-in keeps was written from knowledge of Transformer
Engine's 2.x source (what `layernorm_linear.py` and `attention/dot_product_attention/backends.py` save for backward), which was not at hand
to check it against, and never compared with a GPU:

* a norm that is fused with the linear layer behind it: its input, its own output (the linear layer's input) and one fp32 number a token;
* flash attention: queries, keys, values, its output and one fp32 number a head and token. Values are a copy: as they come they lie in
  the joint projection of queries, keys and values, which then goes.
* context parallelism in a ring: the same of this rank's tokens. Keys and values of one other rank at a time, on their way, are not kept.
* rotary embeddings, fused: the angles, which all layers share.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from nemo.collections.llm.peft.utils import ParallelLinearAdapter
from torch import Tensor, nn


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class Norm(nn.Module):
    """Stands for the norm in `TELayerNormColumnParallelLinear` and for `TENorm`; the parameters of RMSNorm."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., hidden_size] to the same shape and dtype."""
        return _Norm.apply(x, self.weight)  # type: ignore[return-value]


class NormedMlp(MLP):
    """The feed-forward layer with the norm inside, as Transformer Engine's first linear layer has it: what recomputing the layer covers."""

    def __init__(self, config: Any, *arguments: Any, **named: Any):
        super().__init__(config, *arguments, **named)
        self.norm = Norm(config, config.hidden_size)

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None) -> Any:
        """Of Megatron's MLP."""
        return super().forward(self.norm(hidden_states), per_token_scale)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out = query.new_empty(*query.shape[:-2], query.shape[-2] * value.shape[-1])
        statistics = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, statistics)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class FlashAttention(nn.Module):
    """Stands for `TEDotProductAttention`, which looks at no mask and under context parallelism holds its own tokens' keys and values."""

    def __init__(self, config: Any, *_: Any, **__: Any):
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Queries [Q, B, N, D], keys and values [Q, B, G, D] to [Q, B, N * D]."""
        return _Flash.apply(query, key, value)  # type: ignore[return-value]


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, freqs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(freqs)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.empty_like(gradients[0]), None


@contextlib.contextmanager
def rotary_kernel() -> Iterator[None]:
    """Megatron finds the stand-in of the fused rotary embedding, which keeps the angles of all positions, one tensor for all layers."""
    with mock.patch.object(
        rope_utils, "fused_apply_rotary_pos_emb", lambda x, freqs, **_: _Rotated.apply(x, freqs)
    ):
        yield


def layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Megatron's local layers with the stand-ins where Transformer Engine has kernels of its own. Arguments: see `asft_nemo.nemo.layer_spec`."""
    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    spec.submodules.input_layernorm = Norm
    spec.submodules.pre_mlp_layernorm = IdentityOp
    spec.submodules.mlp.module = NormedMlp
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = FlashAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=Norm)  # type: ignore[arg-type]


def gather_for_adapters(chunk: nn.Module) -> None:
    """Under sequence parallelism an adapter behind a norm gets the gathered tokens, as Transformer Engine's fused norm hands them over.

    Without Transformer Engine NeMo's adapter gathers itself, between its dropout and its first matrix (nemo 2.7.3).
    """
    for module in chunk.modules():
        if isinstance(module, ParallelLinearAdapter) and not (
            module.input_is_parallel or module.disable_sequence_parallel_comm
        ):
            module.disable_sequence_parallel_comm = True
            module.register_forward_pre_hook(lambda _, args: gather_from_sequence_parallel_region(args[0]))
