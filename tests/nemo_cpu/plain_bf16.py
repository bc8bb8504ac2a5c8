"""Plain PyTorch in bf16, whose gradients ours are compared with: transformers' model, and the dense loss in fp32 on its logits.

The whole global batch goes through in one pass, so nothing is added up in bf16 that need not be.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from models import make_model
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from asft_nemo.losses import dense_loss
from asft_nemo.objectives import Objective

Gradients = dict[str, Tensor]
Squares = dict[str, tuple[float, float]]


def rounded_model(folder: Path, *, seed: int) -> Path:
    """A random Qwen2 whose weights bf16 can hold, saved in fp32: every computation starts from the same numbers."""
    make_model(folder, tied=False, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.float().save_pretrained(folder)
    return folder


class SplitLinear(nn.Module):
    """A linear layer in two halves, each rounded as a tensor-parallel rank rounds it.

    By columns of the weight (row-parallel: the output is a sum of two), or by its rows (column-parallel: autograd adds up two gradients
    of the input).
    """

    def __init__(self, layer: nn.Linear, *, by_columns: bool):
        super().__init__()
        self.weight, self.bias, self.by_columns = layer.weight, layer.bias, by_columns

    def forward(self, x: Tensor) -> Tensor:
        """[..., columns] to [..., rows]."""
        first, second = self.weight.chunk(2, dim=int(self.by_columns))
        if self.by_columns:
            left, right = x.chunk(2, dim=-1)
            return linear(left, first) + linear(right, second)
        biases = (None, None) if self.bias is None else self.bias.chunk(2)
        return torch.cat([linear(x, first, biases[0]), linear(x, second, biases[1])], dim=-1)


def in_bf16(folder: Path, *, split: bool) -> PreTrainedModel:
    """transformers' model with its own attention in PyTorch; `split`: all its linear layers but the head as on two tensor-parallel ranks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    for name, module in list(model.named_modules()) if split else ():
        parent, _, last = name.rpartition(".")
        if isinstance(module, nn.Linear) and last != "lm_head":
            halves = SplitLinear(module, by_columns=last in ("o_proj", "down_proj"))
            setattr(model.get_submodule(parent), last, halves)
    return model


def plain_gradients(
    policy: Path, ref: Path, items: list[dict[str, Tensor]], objective: Objective, *, split: bool
) -> Gradients:
    """Of the mean loss over the learned tokens of `items`, by autograd, under Hugging Face names, in bf16.

    Args:
        policy, ref: Hugging Face directories.
        items: the examples of the global batch.
        objective: what is differentiated.
        split: see `in_bf16`; of both models.
    """
    tokens_BS, labels_BS, mask_BS = (
        torch.stack([item[key] for item in items]) for key in ("tokens", "labels", "loss_mask")
    )
    model = in_bf16(policy, split=split)
    with torch.no_grad():
        ref_logits_TV = in_bf16(ref, split=split)(input_ids=tokens_BS).logits.flatten(0, 1).float()
    output = dense_loss(
        model(input_ids=tokens_BS).logits.flatten(0, 1).float(),
        labels_BS.flatten(),
        mask_BS.flatten(),
        objective=objective,
        ref_logits_TV=ref_logits_TV,
    )
    (output.loss_sum / output.num_tokens).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def squares(found: Gradients, exact: Gradients) -> Squares:
    """By tensor: the squared length of the error, and of the exact gradient."""
    assert set(found) == set(exact), set(found) ^ set(exact)
    return {
        name: (float((found[name].double() - value).square().sum()), float(value.square().sum()))
        for name, value in exact.items()
    }


def relative(sums: Squares) -> float:
    """Length of the error over length of the gradient, all tensors together; not a number, and so within no bound, where it is not finite."""
    found = (sum(error for error, _ in sums.values()) / sum(length for _, length in sums.values())) ** 0.5
    return found if math.isfinite(found) else math.nan
