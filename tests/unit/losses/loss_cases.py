"""Inputs for the loss tests, shared by the single-process tests and the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from asft_nemo.losses import LossOutput, VocabShard, dense_loss, fused_linear_loss
from asft_nemo.objectives import OBJECTIVES, Objective, WeightInputs, objective

KL_WEIGHT = 0.3
#: (name, direction) of every objective; both directions where there is a divergence.
VARIANTS = [
    (name, direction)
    for name, row in OBJECTIVES.items()
    for direction in (("forward", "reverse") if row.direction else (None,))
]
VARIANT_IDS = [name if direction is None else f"{name}-{direction}" for name, direction in VARIANTS]


def variant_objective(name: str, direction: str | None, kl_weight: float = KL_WEIGHT) -> Objective:
    return objective(name, kl_weight=kl_weight, kl_direction=direction)


@dataclass
class LossCase:
    """One micro batch: hidden states and heads of both models, labels and per-token inputs."""

    hidden_TH: Tensor
    head_VH: Tensor
    ref_hidden_TH: Tensor
    ref_head_VH: Tensor
    labels_T: Tensor
    loss_mask_T: Tensor
    per_token: dict[str, Tensor] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return self.head_VH.shape[0]

    @property
    def logits_TV(self) -> Tensor:
        return self.hidden_TH @ self.head_VH.T

    @property
    def ref_logits_TV(self) -> Tensor:
        return self.ref_hidden_TH @ self.ref_head_VH.T

    def tokens(self, index_T: Tensor) -> LossCase:
        """The same case with its tokens selected or reordered."""
        return replace(
            self,
            hidden_TH=self.hidden_TH[index_T],
            ref_hidden_TH=self.ref_hidden_TH[index_T],
            labels_T=self.labels_T[index_T],
            loss_mask_T=self.loss_mask_T[index_T],
            per_token={name: tensor[index_T] for name, tensor in self.per_token.items()},
        )

    def double(self) -> LossCase:
        """The same numbers in fp64."""
        return replace(
            self,
            hidden_TH=self.hidden_TH.double(),
            head_VH=self.head_VH.double(),
            ref_hidden_TH=self.ref_hidden_TH.double(),
            ref_head_VH=self.ref_head_VH.double(),
            per_token={
                name: tensor.double() if tensor.is_floating_point() else tensor
                for name, tensor in self.per_token.items()
            },
        )

    def dense(self, objective: Objective) -> tuple[LossOutput, Tensor, Tensor, Tensor]:
        """The oracle: output, dLogits, dHidden, dHead."""
        hidden_TH = self.hidden_TH.clone().requires_grad_()
        head_VH = self.head_VH.clone().requires_grad_()
        logits_TV = hidden_TH @ head_VH.T
        logits_TV.retain_grad()
        output = dense_loss(
            logits_TV,
            self.labels_T,
            self.loss_mask_T,
            objective=objective,
            ref_logits_TV=self.ref_logits_TV,
            **self.per_token,
        )
        output.loss_sum.backward()
        assert logits_TV.grad is not None
        assert hidden_TH.grad is not None
        assert head_VH.grad is not None
        return output, logits_TV.grad, hidden_TH.grad, head_VH.grad


def make_case(
    *,
    tokens: int = 24,
    vocab: int = 53,
    hidden: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    valid_share: float = 0.7,
    drift: float = 0.3,
) -> LossCase:
    """A random micro batch: the reference is `drift` away from the policy, weights spread over (0, 1)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden_TH, head_VH = normal(tokens, hidden), normal(vocab, hidden)
    labels_T = torch.randint(vocab, (tokens,), generator=generator)
    # Half the labels are the likeliest ones, so that DFT's weights are not all tiny.
    likely_T = (hidden_TH @ head_VH.T).argmax(dim=1)
    labels_T = torch.where(torch.rand(tokens, generator=generator) < 0.5, likely_T, labels_T)
    loss_mask_T = torch.rand(tokens, generator=generator) < valid_share
    logprob_T = (hidden_TH @ head_VH.T).log_softmax(1).gather(1, labels_T[:, None])[:, 0]
    labels_T = torch.where(loss_mask_T, labels_T, torch.full_like(labels_T, -100))
    return LossCase(
        hidden_TH=hidden_TH.to(dtype),
        head_VH=head_VH.to(dtype),
        ref_hidden_TH=(hidden_TH + drift * normal(tokens, hidden)).to(dtype),
        ref_head_VH=(head_VH + drift * normal(vocab, hidden)).to(dtype),
        labels_T=labels_T,
        loss_mask_T=loss_mask_T,
        per_token={
            "segment_ids_T": torch.arange(tokens) // 7,
            "ref_logprob_T": (logprob_T + 0.4 * normal(tokens)).clamp(max=0.0).to(dtype),
            # Spread of the ratio wide enough that PSFT clips some tokens on either side.
            "old_logprob_T": (logprob_T + 0.4 * normal(tokens)).clamp(max=0.0).to(dtype),
        },
    )


@dataclass(frozen=True)
class FrozenWeight(Objective):
    """An objective whose token weights are given numbers, so that its value is differentiable as written."""

    weight_N: Tensor | None = None

    def token_weight(self, inputs: WeightInputs) -> Tensor:
        assert self.weight_N is not None
        return self.weight_N


def freeze_weight(objective: Objective, case: LossCase) -> Objective:
    """The objective with the weights it has at the case's logits; a value rule needs no freezing."""
    if objective.row.value is not None:
        return objective
    logp_TV = case.logits_TV.log_softmax(dim=1)
    valid_T = case.loss_mask_T
    label_logprob_N = logp_TV[valid_T].gather(1, case.labels_T[valid_T][:, None])[:, 0]
    top_NK = case.logits_TV[valid_T].topk(20, dim=1).values.softmax(dim=1)
    inputs = WeightInputs(
        label_logprob_N=label_logprob_N,
        ref_label_logprob_N=case.per_token["ref_logprob_T"][valid_T],
        old_label_logprob_N=case.per_token["old_logprob_T"][valid_T],
        topk_entropy_N=-(top_NK * top_NK.log()).sum(dim=1),
        segment_ids_N=case.per_token["segment_ids_T"][valid_T],
    )
    return FrozenWeight(
        objective.name,
        objective.kl_weight,
        objective.kl_direction,
        objective.option_items,
        objective.token_weight(inputs),
    )


def worst(*pairs: tuple[Tensor, Tensor]) -> float:
    """The largest absolute difference over the pairs, relative where the expected entries exceed 1.

    NaN where there is a NaN in any pair.
    """
    found = [0.0]
    for ours, expected in pairs:
        assert ours.shape == expected.shape, f"{tuple(ours.shape)} beside {tuple(expected.shape)}"
        if expected.numel():
            found.append(((ours - expected).abs() / expected.abs().clamp(min=1.0)).max().item())
    # Python's max() drops a NaN that is not its first argument.
    return math.nan if any(map(math.isnan, found)) else max(found)


def metric_pairs(ours: LossOutput, expected: LossOutput) -> list[tuple[Tensor, Tensor]]:
    """The metrics of two outputs, sums and denominators, side by side."""
    assert list(ours.metrics) == list(expected.metrics)
    return [
        (ours.metrics[name][part], expected.metrics[name][part])
        for name in expected.metrics
        for part in (0, 1)
    ]


@dataclass(frozen=True)
class Fused:
    """What `fused_linear_loss` gave: output, dHidden, dHead (None where autograd got none)."""

    output: LossOutput
    hidden: Tensor | None
    head: Tensor | None


def fused(
    case: LossCase,
    chosen: Objective,
    *,
    padding: int = 0,
    scale: float = 1.0,
    backward: bool = True,
    head_trains: bool = True,
    **options: Any,
) -> Fused:
    """The fused loss on one rank, the padded rows of both heads filled with NaN, and its gradients."""

    def padded(head_VH: Tensor) -> Tensor:
        return torch.cat([head_VH, head_VH.new_full((padding, head_VH.shape[1]), torch.nan)])

    hidden = case.hidden_TH.clone().requires_grad_()
    head = padded(case.head_VH).requires_grad_(head_trains)
    output = fused_linear_loss(
        hidden,
        head,
        case.labels_T,
        case.loss_mask_T,
        objective=chosen,
        shard=VocabShard.of_rank(0, 1, case.vocab_size + padding, case.vocab_size, None),
        ref_hidden_TH=case.ref_hidden_TH,
        ref_head_VH=padded(case.ref_head_VH),
        **case.per_token,
        **options,
    )
    if backward:
        (output.loss_sum * scale).backward()
    return Fused(output, hidden.grad, head.grad)
