"""The head of the last pipeline stage: logits as usual, or the objective's loss straight from hidden states.

The loss owns the head GEMM. It runs inside the output layer's own forward, so that Megatron's forward hooks on that layer
(`overlap_param_gather` waits for its weights there) see the call.

Shapes: S sequence (on this rank), B micro batch, H hidden, V this rank's vocabulary rows, T = S * B tokens of the tensor-parallel
group's micro batch, ordered [S, B].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from asft_nemo.losses import LossOutput, VocabShard, dense_loss, fused_linear_loss, vocab_parallel_loss
from asft_nemo.nemo.head_gradient import into_main_grad
from asft_nemo.objectives import Objective


@dataclass(frozen=True)
class LossInputs:
    """What the loss reads besides the policy's hidden states.

    Attributes:
        labels_BS: int64 [B, S], already shifted; any value where the mask is False.
        loss_mask_BS: bool [B, S]; True counts.
        ref_hidden_SBH: the reference's final hidden states, [S, B, H] (this rank's S/TP rows under sequence parallelism), or None.
        ref_head_VH: the reference's head, this rank's vocabulary rows, or None.
        ref_logprob_BS: the reference's log probability of each label, [B, S], or None.
        old_logprob_BS: the same of the snapshot of the policy.
        segment_ids_BS: int64 [B, S], the sequence each token belongs to, numbered from 0 in each row; None where every row is one sequence.
    """

    labels_BS: Tensor
    loss_mask_BS: Tensor
    ref_hidden_SBH: Tensor | None = None
    ref_head_VH: Tensor | None = None
    ref_logprob_BS: Tensor | None = None
    old_logprob_BS: Tensor | None = None
    segment_ids_BS: Tensor | None = None

    def per_token(self) -> dict[str, Any]:
        """The losses' per-token arguments, each [T] in the order of the hidden states' leading dimensions."""
        rows, length = self.labels_BS.shape
        first_B1 = length * torch.arange(rows, device=self.labels_BS.device).unsqueeze(1)
        # numbered in each row, of which there are fewer than tokens: so no two rows share a number
        segments = 0 if self.segment_ids_BS is None else self.segment_ids_BS
        segment_ids_BS = (first_B1 + segments).expand_as(self.labels_BS)
        return {
            "labels_T": _by_token(self.labels_BS),
            "loss_mask_T": _by_token(self.loss_mask_BS),
            "ref_logprob_T": _by_token(self.ref_logprob_BS),
            "old_logprob_T": _by_token(self.old_logprob_BS),
            "segment_ids_T": _by_token(segment_ids_BS),
        }


@dataclass(frozen=True)
class LossSpec:
    """Which loss the head computes, and how.

    Attributes:
        objective: the row of the objective table.
        implementation: a key of `IMPLEMENTATIONS`.
        vocab_size: rows of the vocabulary that count; the rest is padding.
        chunk_tokens: of the fused implementation: tokens per visit of the head, or ``auto``.
    """

    objective: Objective
    implementation: str
    vocab_size: int
    chunk_tokens: int | Literal["auto"]


def shard_of(layer: tensor_parallel.ColumnParallelLinear, vocab_size: int) -> VocabShard:
    """This rank's slice of the vocabulary, from the layer that holds it.

    Args:
        layer: the output layer; its output size is the padded vocabulary.
        vocab_size: rows that count.
    """
    group: Any = layer.tp_group
    return VocabShard.of_rank(
        group.rank(),
        group.size(),
        layer.output_size,
        vocab_size,
        group,
        sequence_parallel=layer.sequence_parallel,
    )


class LossHead(tensor_parallel.ColumnParallelLinear):
    """Megatron's output layer that can also compute the loss.

    Without `loss_inputs` it is Megatron's layer. With them it returns the `LossOutput` of the micro batch; collectives are those
    of the implementation.
    """

    def forward(  # type: ignore[override]
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        loss_inputs: LossInputs | None = None,
        spec: LossSpec | None = None,
    ) -> Any:
        """`input_` is [S, B, H]; `weight` [V, H] where the embedding is tied, else None."""
        if loss_inputs is None:
            return super().forward(input_, weight=weight, runtime_gather_output=runtime_gather_output)
        assert spec is not None
        return IMPLEMENTATIONS[spec.implementation](self, input_, weight, loss_inputs, spec)

    def policy_logits(self, hidden_SBH: Tensor, weight: Tensor | None) -> Tensor:
        """This rank's logits [S, B, V] by Megatron's own layer."""
        logits_SBV, _ = super().forward(hidden_SBH, weight=weight, runtime_gather_output=False)
        return logits_SBV

    def reference_logits(self, inputs: LossInputs) -> Tensor | None:
        """The reference's logits [S, B, V] by the same kernel and shapes as the policy's, or None when nothing reads them."""
        hidden, head = inputs.ref_hidden_SBH, inputs.ref_head_VH
        if hidden is None or head is None:
            return None
        with torch.no_grad():
            if self.sequence_parallel:
                hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
            # two-dimensional, as torch.matmul folds the policy's: the same kernel, so equal weights give equal bits
            return torch.matmul(hidden.flatten(0, 1), head.t()).unflatten(0, hidden.shape[:2])


def _by_token(tensor_BS: Tensor | None) -> Any:
    return None if tensor_BS is None else tensor_BS.transpose(0, 1).reshape(-1)


def _flat(tensor_SBX: Tensor | None) -> Tensor | None:
    return None if tensor_SBX is None else tensor_SBX.flatten(0, 1)


def _fused(
    head: LossHead, hidden: Tensor, weight: Tensor | None, inputs: LossInputs, spec: LossSpec
) -> LossOutput:
    """Straight from hidden states, in chunks: neither model's logits are ever whole."""
    head_VH = head.weight if weight is None else weight
    assert head_VH is not None
    return fused_linear_loss(
        hidden.flatten(0, 1),
        head_VH,
        **inputs.per_token(),
        objective=spec.objective,
        shard=shard_of(head, spec.vocab_size),
        ref_hidden_TH=_flat(inputs.ref_hidden_SBH),
        ref_head_VH=inputs.ref_head_VH,
        chunk_tokens=spec.chunk_tokens,
        head_gradient=into_main_grad(head_VH, head.config),
    )


def _vocab_parallel(
    head: LossHead, hidden: Tensor, weight: Tensor | None, inputs: LossInputs, spec: LossSpec
) -> LossOutput:
    """From Megatron's own sharded logits of both models."""
    return vocab_parallel_loss(
        head.policy_logits(hidden, weight).flatten(0, 1),
        **inputs.per_token(),
        objective=spec.objective,
        shard=shard_of(head, spec.vocab_size),
        ref_logits_TV=_flat(head.reference_logits(inputs)),
    )


def _dense(
    head: LossHead, hidden: Tensor, weight: Tensor | None, inputs: LossInputs, spec: LossSpec
) -> LossOutput:
    """Gathers the whole vocabulary on every rank and calls the definition: for comparison, not for large vocabularies."""

    def whole(logits_SBV: Tensor) -> Tensor:
        full = tensor_parallel.gather_from_tensor_model_parallel_region(logits_SBV, group=head.tp_group)
        return full.flatten(0, 1)[:, : spec.vocab_size]

    reference_SBV = head.reference_logits(inputs)
    return dense_loss(
        whole(head.policy_logits(hidden, weight)),
        **inputs.per_token(),
        objective=spec.objective,
        ref_logits_TV=None if reference_SBV is None else whole(reference_SBV),
    )


IMPLEMENTATIONS: dict[str, Callable[..., LossOutput]] = {
    "fused": _fused,
    "vocab_parallel": _vocab_parallel,
    "dense": _dense,
}
