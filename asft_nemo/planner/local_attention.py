"""Bytes of Megatron's own attention (`kernels.layers=local`, and every CPU rank), which keeps its probabilities.

After `DotProductAttention` and `FusedScaleMaskSoftmax` of megatron-core 0.15.3 with torch's softmax, in the compute dtype (NeMo's config has
`attention_softmax_in_fp32=False`); every term is a tensor that `tests/nemo_cpu/test_allocation.py` meets in a real run. With apex's fused softmax
backward takes less. Letters: see `asft_nemo.planner.activations`.
"""

from __future__ import annotations

from dataclasses import dataclass

from asft_nemo.config.schema import RunConfig
from asft_nemo.model.spec import ModelSpec
from asft_nemo.planner.precision import ByteWidths
from asft_nemo.planner.tokens import Tokens

# Beside the gradient that comes in, backward of the mask's `masked_fill_`, which writes into a view, makes the whole gradient anew, a copy of
# it, the masked copy, and one zeroed buffer to put it back into.
_GRADIENTS_OF_SCORES = 4


@dataclass(frozen=True)
class LocalAttention:
    """One micro batch in one layer.

    Attributes:
        kept: between the two linear layers, the second one's input included.
        core: the part of `kept` that recomputing the products saves.
        backward: what its backward pass holds for a moment, less what of `kept` is gone by then.
        scores: one set of attention scores, T * keys * a / t.
    """

    kept: int
    core: int
    backward: int
    scores: int

    @classmethod
    def of(cls, run: RunConfig, spec: ModelSpec, widths: ByteWidths) -> LocalAttention:
        """The policy's."""
        tokens, tp_size, c = Tokens.of(run), run.parallel.tp_size, widths.compute
        queries, keys = spec.query_rows // tp_size, spec.key_value_rows // tp_size
        scores = tokens.whole * c * (spec.num_attention_heads // tp_size) * tokens.keys
        grouped = queries if keys < queries else keys  # keys and values are repeated for every query head
        output = 0 if run.peft.name != "none" else queries  # the input of a trained projection
        kept = tokens.whole * c * (queries + 2 * grouped + output) + scores
        # Recomputed, it keeps what comes in: rotated queries and keys, and values inside the joint projection that they are a view of
        again = tokens.whole * c * (queries + keys + (queries + 2 * keys) + output)
        gone = tokens.whole * c * (grouped + output) + scores
        # the values' gradient and the residual's wait meanwhile
        waiting = c * (tokens.whole * grouped + tokens.shared * spec.hidden_size)
        return cls(kept, kept - again, _GRADIENTS_OF_SCORES * scores + waiting - gone, scores)


def shared_buffer_bytes(run: RunConfig, spec: ModelSpec, widths: ByteWidths) -> int:
    """What all layers share and nobody frees: Megatron's buffer for scores (`GlobalMemoryBuffer`), and the causal mask of booleans."""
    return LocalAttention.of(run, spec, widths).scores + Tokens.of(run).keys ** 2
