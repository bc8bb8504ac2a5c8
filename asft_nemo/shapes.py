"""The legend of shape letters, and the array types of public functions.

Names inside functions end in the letters of their dims (`logits_TV`), outermost first:

| letter | dim |
|---|---|
| `T` | tokens of the tensor-parallel group's micro batch (flattened batch x sequence) |
| `N` | the valid tokens among them, in their order |
| `H` | hidden size |
| `V` | this rank's vocabulary rows, padded rows included |
| `R` | ranks of the tensor-parallel group |
| `K` | statistics exchanged per token |
| `M` | metrics of the objective |
| `D` | domains, the files of the training data |

The aliases below carry these shapes where jaxtyping is installed, as it is for the tests, which check them.
Where it is not they are plain tensors: nothing at run time depends on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    HiddenTH: TypeAlias = Tensor
    HeadVH: TypeAlias = Tensor
    LogitsTV: TypeAlias = Tensor
    RefHiddenTH: TypeAlias = Tensor
    RefHeadVH: TypeAlias = Tensor
    LabelsT: TypeAlias = Tensor
    LossMaskT: TypeAlias = Tensor
    SegmentIdsT: TypeAlias = Tensor
    LogProbT: TypeAlias = Tensor
else:
    try:
        from jaxtyping import Bool, Float, Int64
    except ImportError:
        HiddenTH = HeadVH = LogitsTV = RefHiddenTH = RefHeadVH = Tensor
        LabelsT = LossMaskT = SegmentIdsT = LogProbT = Tensor
    else:
        # Hidden states may be a rank's part of the tokens, hence a name of their own for their rows.
        HiddenTH = Float[Tensor, "hidden_tokens hidden"]
        RefHiddenTH = Float[Tensor, "hidden_tokens ref_hidden"]
        HeadVH = Float[Tensor, "vocabulary hidden"]
        RefHeadVH = Float[Tensor, "vocabulary ref_hidden"]
        LogitsTV = Float[Tensor, "tokens vocabulary"]
        LabelsT = Int64[Tensor, " tokens"]
        LossMaskT = Bool[Tensor, " tokens"]
        SegmentIdsT = Int64[Tensor, " tokens"]
        LogProbT = Float[Tensor, " tokens"]
