"""What a case's gradients and loss must be: one process, fp64, no layout, no packing, no recomputation, the dense loss.

Weights are the step's own policy, under Hugging Face names, or the base and the step's adapters; the examples run one by one in transformers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from exactness_factors import LORA, SHAPE
from models import load64
from torch import Tensor
from transformers import PreTrainedModel

from asft_nemo.losses import LossOutput, dense_loss
from asft_nemo.objectives import Objective

LAYERS = "module.decoder.layers"
Examples = list[dict[str, Tensor]]


def expected(
    policy: PreTrainedModel,
    leaves: dict[str, Tensor],
    weights: dict[str, Tensor],
    base: PreTrainedModel,
    micro_batches: list[Examples],
    *,
    objective: Objective,
    mean_of_micro_batches: bool,
) -> tuple[dict[str, Tensor], float]:
    """Gradients of all leaves in fp64, and the loss.

    Args:
        policy: the architecture.
        leaves: what is differentiated, by name.
        weights: the policy's, functions of the leaves.
        base: reference and first snapshot.
        micro_batches: the step's examples by micro batch, of all data-parallel ranks.
        objective: what is differentiated.
        mean_of_micro_batches: the mean is that of the micro batches' means; those without a learned token do not count.
    """
    outputs = [_loss(policy, weights, base, items, objective) for items in micro_batches]
    sums = torch.stack([output.loss_sum for output in outputs])
    counts = torch.tensor([int(output.num_tokens) for output in outputs], dtype=torch.float64)
    if mean_of_micro_batches:
        loss = (sums / counts.clamp(min=1)).sum() / (counts > 0).sum()
    else:
        loss = sums.sum() / counts.sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True)), float(loss.detach())


def _loss(
    policy: PreTrainedModel,
    weights: dict[str, Tensor],
    base: PreTrainedModel,
    items: Examples,
    objective: Objective,
) -> LossOutput:
    """The dense definition over some examples, each a sequence of its own."""
    batch = {key: torch.stack([item[key] for item in items]) for key in ("tokens", "labels", "loss_mask")}
    logits_TV = torch.func.functional_call(policy, weights, kwargs={"input_ids": batch["tokens"]}).logits
    labels_T = batch["labels"].flatten()
    with torch.no_grad():
        base_TV = base(input_ids=batch["tokens"]).logits.flatten(0, 1)
    base_logprob_T = base_TV.log_softmax(-1).gather(1, labels_T[:, None]).squeeze(1)
    return dense_loss(
        logits_TV.flatten(0, 1),
        labels_T,
        batch["loss_mask"].flatten(),
        objective=objective,
        ref_logits_TV=base_TV if "ref_hidden" in objective.reads else None,
        ref_logprob_T=base_logprob_T if "ref_label_logprob" in objective.reads else None,
        old_logprob_T=base_logprob_T if "old_label_logprob" in objective.reads else None,
        segment_ids_T=torch.arange(len(items)).repeat_interleave(batch["tokens"].shape[1]),
    )


def full_policy(folder: Path) -> tuple[PreTrainedModel, dict[str, Tensor], dict[str, Tensor]]:
    """The policy, its parameters as leaves, and its weights, which are these."""
    policy = load64(folder)
    leaves = dict(policy.named_parameters())
    return policy, leaves, leaves


def adapted_policy(
    folder: Path, adapters: dict[str, Tensor]
) -> tuple[PreTrainedModel, dict[str, Tensor], dict[str, Tensor]]:
    """The base, the adapters as leaves, and the base's weights with the adapters merged into them."""
    policy = load64(folder).requires_grad_(False)
    leaves = {name: value.double().requires_grad_() for name, value in adapters.items()}
    return policy, leaves, merged(dict(policy.named_parameters()), leaves)


def merged(base: dict[str, Tensor], adapters: dict[str, Tensor]) -> dict[str, Tensor]:
    """``W + alpha / rank B A`` under Hugging Face names, rearranged here by hand.

    Rows of linear_qkv are, group by group, the queries' heads, the key's and the value's; linear_fc1 is gate, then up.
    """
    heads, groups = SHAPE.num_attention_heads // SHAPE.num_query_groups, SHAPE.num_query_groups

    def update(name: str) -> Tensor:  # [layers, out, in]
        low, high = (adapters[f"{LAYERS}.{name}.adapter.linear_{side}.weight"] for side in ("in", "out"))
        return LORA["peft.alpha"] / LORA["peft.rank"] * high @ low

    qkv = update("self_attention.linear_qkv").unflatten(1, (groups, heads + 2, SHAPE.head_channels))
    gate, up = update("mlp.linear_fc1").chunk(2, dim=1)
    updates = {
        "self_attn.q_proj": qkv[:, :, :heads].flatten(1, 3),
        "self_attn.k_proj": qkv[:, :, heads].flatten(1, 2),
        "self_attn.v_proj": qkv[:, :, heads + 1].flatten(1, 2),
        "self_attn.o_proj": update("self_attention.linear_proj"),
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "mlp.down_proj": update("mlp.linear_fc2"),
    }
    result = dict(base)
    for part, layers in updates.items():
        for layer, value in enumerate(layers):
            result[f"model.layers.{layer}.{part}.weight"] = (
                base[f"model.layers.{layer}.{part}.weight"] + value
            )
    return result
