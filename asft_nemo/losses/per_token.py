"""The per-token inputs of a loss: checked, and reduced to the valid tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asft_nemo.errors import DataError, ObjectiveError
from asft_nemo.objectives import Objective, WeightInputs


@dataclass(frozen=True)
class ValidTokens:
    """The tokens that count, in their order, and what is known of each.

    Attributes:
        index_N: int64 positions among the T tokens.
        num_tokens: T.
        labels_N: int64, checked to lie in the vocabulary.
        segment_ids_N, ref_logprob_N, old_logprob_N: as given, None where the objective does not read them.
    """

    index_N: Tensor
    num_tokens: int
    labels_N: Tensor
    segment_ids_N: Tensor | None
    ref_logprob_N: Tensor | None
    old_logprob_N: Tensor | None

    @property
    def count(self) -> int:
        """N, the number of valid tokens."""
        return self.index_N.shape[0]

    @property
    def everything_valid(self) -> bool:
        """True where all T tokens count, so that selecting them would be a copy for nothing."""
        return self.count == self.num_tokens

    def select(self, tensor_T: Tensor) -> Tensor:
        """The rows of the valid tokens."""
        return tensor_T if self.everything_valid else tensor_T.index_select(0, self.index_N)

    def scatter(self, values_N: Tensor) -> Tensor:
        """[T, ...] holding the given rows at the valid tokens and 0 elsewhere."""
        if self.everything_valid:
            return values_N
        return values_N.new_zeros(self.num_tokens, *values_N.shape[1:]).index_copy_(0, self.index_N, values_N)

    def weight_inputs(
        self, label_logprob_N: Tensor, topk_entropy_N: Tensor | None, chunk: slice
    ) -> WeightInputs:
        """What the weight rule reads of the tokens in `chunk`."""

        def part(tensor_N: Tensor | None) -> Tensor | None:
            return None if tensor_N is None else tensor_N[chunk]

        return WeightInputs(
            label_logprob_N=label_logprob_N,
            ref_label_logprob_N=part(self.ref_logprob_N),
            old_label_logprob_N=part(self.old_logprob_N),
            topk_entropy_N=topk_entropy_N,
            segment_ids_N=part(self.segment_ids_N),
        )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_reference(objective: Objective, *tensors: Tensor | None) -> None:
    """Raises ObjectiveError where the objective reads the reference's hidden states and they are missing."""
    if objective.divergence is not None and any(tensor is None for tensor in tensors):
        raise ObjectiveError(
            f"objective {objective.name} with kl_weight={objective.kl_weight:g} reads the reference "
            f"and got none: set reference=resident, or kl_weight=0 if you want no anchor"
        )


def _check_labels(labels_N: Tensor, index_N: Tensor, vocab_size: int) -> None:
    outside_N = (labels_N < 0) | (labels_N >= vocab_size)
    if bool(outside_N.any()):
        first = int(outside_N.nonzero()[0])
        raise DataError(
            f"label {int(labels_N[first])} at token {int(index_N[first])} counts in the loss and is outside "
            f"the vocabulary of {vocab_size} rows ({int(outside_N.sum())} such labels): mask it, or use the "
            f"tokenizer the model was trained with"
        )


def valid_tokens(
    labels_T: Tensor,
    loss_mask_T: Tensor,
    objective: Objective,
    vocab_size: int,
    *,
    segment_ids_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    old_logprob_T: Tensor | None,
) -> ValidTokens:
    """Keeps the tokens where the mask is True. Synchronises the device twice: their number, the label check.

    Raises:
        DataError: a valid label outside the vocabulary.
        ObjectiveError: something per token that the objective reads is missing.
        ValueError: tensors of different lengths.
    """
    per_token = {
        "segment_ids_T": segment_ids_T if objective.scope == "sequence" else None,
        "ref_logprob_T": ref_logprob_T if "ref_label_logprob" in objective.reads else None,
        "old_logprob_T": old_logprob_T if "old_label_logprob" in objective.reads else None,
    }
    needed = {
        "segment_ids_T": objective.scope == "sequence",
        "ref_logprob_T": "ref_label_logprob" in objective.reads,
        "old_logprob_T": "old_label_logprob" in objective.reads,
    }
    for name, tensor in (("loss_mask_T", loss_mask_T), *per_token.items()):
        if tensor is not None and tensor.shape != labels_T.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, labels_T has {tuple(labels_T.shape)}")
        if tensor is None and needed.get(name):
            raise ObjectiveError(f"objective {objective.name} reads {name} and got none: pass it per token")
    if loss_mask_T.dtype != torch.bool:
        raise ValueError(f"loss_mask_T must be bool (True counts), got {loss_mask_T.dtype}")
    index_N = loss_mask_T.nonzero().squeeze(1)
    labels_N = labels_T.index_select(0, index_N)
    _check_labels(labels_N, index_N, vocab_size)
    kept = {
        name: None if tensor is None else tensor.detach().index_select(0, index_N)
        for name, tensor in per_token.items()
    }
    return ValidTokens(
        index_N=index_N,
        num_tokens=labels_T.shape[0],
        labels_N=labels_N,
        segment_ids_N=kept["segment_ids_T"],
        ref_logprob_N=kept["ref_logprob_T"],
        old_logprob_N=kept["old_logprob_T"],
    )
