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

The aliases below are checked where a test wraps a function with jaxtyping; at run time they cost nothing.
"""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Bool, Float, Int64
from torch import Tensor

HiddenTH: TypeAlias = Float[Tensor, "tokens hidden"]
HeadVH: TypeAlias = Float[Tensor, "vocabulary hidden"]
LogitsTV: TypeAlias = Float[Tensor, "tokens vocabulary"]
RefHiddenTH: TypeAlias = Float[Tensor, "tokens ref_hidden"]
RefHeadVH: TypeAlias = Float[Tensor, "vocabulary ref_hidden"]
LabelsT: TypeAlias = Int64[Tensor, " all_tokens"]
LossMaskT: TypeAlias = Bool[Tensor, " all_tokens"]
SegmentIdsT: TypeAlias = Int64[Tensor, " all_tokens"]
LogProbT: TypeAlias = Float[Tensor, " all_tokens"]
