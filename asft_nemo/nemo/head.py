"""The head of the last pipeline stage: logits as usual, or the objective's loss straight from hidden states.

The loss owns the head GEMM. It runs inside the output layer's own forward, so that Megatron's forward hooks on that layer
(`overlap_param_gather` waits for its weights there) see the call.

Shapes: S sequence (on this rank), B micro batch, H hidden, V this rank's vocabulary rows, T = S * B tokens of the tensor-parallel
group's micro batch, ordered [S, B].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from asft_nemo.losses import LossOutput, VocabShard, dense_loss, vocab_parallel_loss
from asft_nemo.objectives import Objective


@dataclass(frozen=True)
class LossInputs:
    """What the loss reads besides the policy's hidden states.

    Attributes:
        labels_BS: int64 [B, S], already shifted; any value where the mask is False.
        loss_mask_BS: bool [B, S]; True counts.
        ref_hidden_SBH: the reference's final hidden states, [S, B, H] (this rank's S/TP rows under sequence parallelism), or None.
        ref_head_VH: the reference's head, this rank's vocabulary rows, or None.
    """

    labels_BS: Tensor
    loss_mask_BS: Tensor
    ref_hidden_SBH: Tensor | None = None
    ref_head_VH: Tensor | None = None


@dataclass(frozen=True)
class LossSpec:
    """Which loss the head computes, and how.

    Attributes:
        objective: the row of the objective table.
        implementation: ``vocab_parallel`` or ``dense``.
        vocab_size: rows of the vocabulary that count; the rest is padding.
    """

    objective: Objective
    implementation: str
    vocab_size: int


def shard_of(layer: tensor_parallel.ColumnParallelLinear, vocab_size: int) -> VocabShard:
    """This rank's slice of the vocabulary, from the layer that holds it.

    Args:
        layer: the output layer; its output size is the padded vocabulary.
        vocab_size: rows that count.
    """
    group = layer.tp_group
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

    Without `loss_inputs` it is Megatron's layer. With them it returns the `LossOutput` of the micro batch; collectives are those of
    the layer (an all-gather of hidden states under sequence parallelism, an all-reduce or reduce-scatter of dHidden in backward) and
    of the loss (one packed exchange of statistics).
    """

    def forward(  # type: ignore[override]
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        loss_inputs: LossInputs | None = None,
        spec: LossSpec | None = None,
    ):
        if loss_inputs is None:
            return super().forward(input_, weight=weight, runtime_gather_output=runtime_gather_output)
        assert spec is not None
        logits_SBV, _ = super().forward(input_, weight=weight, runtime_gather_output=False)
        return IMPLEMENTATIONS[spec.implementation](self, logits_SBV, loss_inputs, spec)

    def reference_logits(self, loss_inputs: LossInputs) -> Tensor | None:
        """The reference's logits [S, B, V] by the same kernel and shapes as the policy's, or None when nothing reads them."""
        hidden, head = loss_inputs.ref_hidden_SBH, loss_inputs.ref_head_VH
        if hidden is None or head is None:
            return None
        with torch.no_grad():
            if self.sequence_parallel:
                hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
            # two-dimensional, as torch.matmul folds the policy's: the same kernel, so equal weights give equal bits
            return torch.matmul(hidden.flatten(0, 1), head.t()).unflatten(0, hidden.shape[:2])


def _tokens(loss_inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Labels and mask as [T] in the order of the logits' leading dimensions."""
    return (
        loss_inputs.labels_BS.transpose(0, 1).reshape(-1),
        loss_inputs.loss_mask_BS.transpose(0, 1).reshape(-1),
    )


def _flat(logits_SBV: Tensor | None) -> Tensor | None:
    return None if logits_SBV is None else logits_SBV.flatten(0, 1)


def _vocab_parallel(head: LossHead, logits_SBV: Tensor, inputs: LossInputs, spec: LossSpec) -> LossOutput:
    labels_T, mask_T = _tokens(inputs)
    return vocab_parallel_loss(
        logits_SBV.flatten(0, 1),
        labels_T,
        mask_T,
        objective=spec.objective,
        shard=shard_of(head, spec.vocab_size),
        ref_logits_TV=_flat(head.reference_logits(inputs)),
    )


def _dense(head: LossHead, logits_SBV: Tensor, inputs: LossInputs, spec: LossSpec) -> LossOutput:
    """Gathers the whole vocabulary on every rank and calls the definition: for comparison, not for large vocabularies."""
    labels_T, mask_T = _tokens(inputs)

    def whole(logits: Tensor | None) -> Tensor | None:
        if logits is None:
            return None
        full = tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=head.tp_group)
        return full.flatten(0, 1)[:, : spec.vocab_size]

    logits_TV = whole(logits_SBV)
    assert logits_TV is not None
    return dense_loss(
        logits_TV,
        labels_T,
        mask_T,
        objective=spec.objective,
        ref_logits_TV=whole(head.reference_logits(inputs)),
    )


IMPLEMENTATIONS = {"vocab_parallel": _vocab_parallel, "dense": _dense}
