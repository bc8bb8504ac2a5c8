"""How many floating-point operations a step asks for, from the model's sizes alone.

A multiply with its add counts two. Only matrix products count: a linear layer of a x b weights costs 2ab per token; attention costs
4 * head_channels * num_attention_heads per pair of a query and a key it attends to (scores, and the weighted sum of values); norms,
activations, softmax and rotary embeddings are left out. Backward costs twice the forward pass: one product for the gradient of the input, one
for that of the weight. This is the counting of PaLM (appendix B), of Megatron-LM's and of NeMo's `flops_formulas`, causal attention as half of
the square. What is computed again in backward (`recompute.*`) is not counted: these are the model's operations, so what is made of them is a
*model* FLOPs utilisation (MFU), not a hardware one.

Where we count less than those sources do, because less is computed:

* the head is counted for the tokens that reach it. The fused loss hands it the learned tokens alone; `Flops` of all positions is
  `forward_flops(..., head_tokens=tokens)`, which is NeMo's number;
* attention between the examples of a packed row, which there is none of;
* under LoRA the frozen weights have no gradient: backward of a linear layer is one product, not two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from asft_nemo.config.model_shape import ModelShape
from asft_nemo.config.schema import RunConfig
from asft_nemo.config.tables import OBJECTIVES


@dataclass(frozen=True)
class Flops:
    """Operations of one forward pass.

    Attributes:
        layers: products with the weights of all transformer layers.
        attention: queries with keys and probabilities with values: no weights are in these.
        head: products with the output matrix.
    """

    layers: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All three."""
        return self.layers + self.attention + self.head


def forward_flops(
    shape: ModelShape, *, tokens: float, attended: float, head_tokens: float | None = None
) -> Flops:
    """Operations of one forward pass.

    Args:
        shape: the model's sizes; for a pipeline stage, with its own `num_layers`.
        tokens: positions that pass the layers, padding included, for it is computed on.
        attended: pairs of a query and a key, see `causal_pairs`.
        head_tokens: positions that reach the head; None for all of `tokens`.
    """
    per_token = sum(inputs * outputs for inputs, outputs in _linear_layers(shape).values())
    query_rows = shape.num_attention_heads * shape.head_channels
    return Flops(
        layers=2.0 * shape.num_layers * per_token * tokens,
        attention=4.0 * shape.num_layers * query_rows * attended,
        head=2.0 * shape.hidden_size * shape.vocab_size * (tokens if head_tokens is None else head_tokens),
    )


def causal_pairs(lengths: Iterable[int]) -> float:
    """Pairs of a query and a key when every sequence attends to itself causally: half of each length's square, by convention."""
    return sum(length * length for length in lengths) / 2


def adapter_flops(shape: ModelShape, *, tokens: float, rank: int, targets: Sequence[str]) -> float:
    """Operations of one forward pass of the LoRA adapters: per linear layer of a x b weights two products of rank * a and rank * b.

    Args:
        shape: the model's sizes.
        tokens: positions that pass the layers.
        rank: of the adapters.
        targets: Megatron's names of the adapted linear layers, see `LORA_TARGETS`.
    """
    layers = _linear_layers(shape)
    per_token = sum(rank * (layers[name][0] + layers[name][1]) for name in targets)
    return 2.0 * shape.num_layers * per_token * tokens


def training_flops(forward: Flops, *, adapters: float | None) -> float:
    """Operations of forward and backward of the policy.

    Args:
        forward: of the model, without adapters.
        adapters: see `adapter_flops`; None for full fine-tuning.

    Full fine-tuning: three times the forward pass. LoRA: frozen linear layers and the frozen head twice (forward, and the gradient of their
    input), attention and the adapters three times. That the first layer's input needs no gradient is not deducted.
    """
    if adapters is None:
        return 3.0 * forward.total
    return 2.0 * (forward.layers + forward.head) + 3.0 * (forward.attention + adapters)


def _linear_layers(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a transformer layer's linear layers, by Megatron's names; the gated MLP's first one holds gate and value."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    query_rows = shape.num_attention_heads * shape.head_channels
    key_value_rows = 2 * shape.num_query_groups * shape.head_channels
    return {
        "linear_qkv": (hidden, query_rows + key_value_rows),
        "linear_proj": (query_rows, hidden),
        "linear_fc1": (hidden, 2 * ffn),
        "linear_fc2": (ffn, hidden),
    }


@dataclass(frozen=True)
class Computed:
    """What a step computes on, all data-parallel ranks together.

    Attributes:
        positions: tokens that pass the layers, padding included.
        attended: pairs of a query and a key, see `causal_pairs`.
        learned: tokens with a loss.
    """

    positions: float
    attended: float
    learned: float


@dataclass(frozen=True)
class StepFlops:
    """Operations of a step, of all GPUs together.

    Attributes:
        policy: its forward and backward.
        frozen: the passes ahead of the step, of the reference and of psft's snapshot, with their heads.
        policy_by_convention: of the policy with the head at every position, as NeMo and Megatron-LM count.
    """

    policy: float
    frozen: float
    policy_by_convention: float


def step_flops(
    run: RunConfig, shape: ModelShape, computed: Computed, *, hit_rate: float | None = None
) -> StepFlops:
    """Operations of a step of a run.

    Args:
        run: the settings.
        shape: the model's sizes.
        computed: what the step computes on.
        hit_rate: share of the reference's hidden states that come from a cache; None = all of them where the reference is cached.
    """
    everywhere = forward_flops(shape, tokens=computed.positions, attended=computed.attended)
    learned = forward_flops(
        shape, tokens=computed.positions, attended=computed.attended, head_tokens=computed.learned
    )
    # only the fused loss hands the head the learned tokens alone
    forward = learned if run.loss.implementation == "fused" else everywhere
    peft, adapters = run.peft, None
    if peft.name == "lora":
        adapters = adapter_flops(shape, tokens=computed.positions, rank=peft.rank, targets=peft.targets)
    objective = run.objective
    facts = OBJECTIVES[objective.name]
    whole_reference = facts.has_divergence and objective.kl_weight != 0
    frozen = 0.0
    if whole_reference or facts.reads_ref_labels:
        cached = run.reference.form == "cached"
        body = (1.0 - (1.0 if hit_rate is None else hit_rate)) if cached else 1.0
        head = forward.head if whole_reference else learned.head
        frozen += body * (learned.layers + learned.attention) + head
    if facts.reads_old_labels:
        frozen += learned.total
    return StepFlops(
        policy=training_flops(forward, adapters=adapters),
        frozen=frozen,
        policy_by_convention=training_flops(everywhere, adapters=adapters),
    )
