"""Bytes a number takes, by what it is for, in each precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

from asft_nemo.config.fp8 import FP8
from asft_nemo.config.schema import RunConfig


@dataclass(frozen=True)
class ByteWidths:
    """Bytes a number.

    Attributes:
        compute: of activations, and of weights that are not FP8.
        linear_weight: of the weights of the layers' linear layers.
        linear_input: of what a linear layer keeps of its input for its weight's gradient.
        gradient: of the sums of gradients over micro batches.
        optimizer: of masters and both moments together.
        edge_layers: layers at each end of the model whose linear layers are bf16 in an FP8 run.
        kernels: te = Transformer Engine's layers, local = Megatron's own.
        fused: the gated activation and the rotary embedding are one kernel each, which keep their inputs alone (`kernels.fusions`).
    """

    compute: int
    linear_weight: int
    linear_input: int
    gradient: int = 4
    optimizer: int = 12
    edge_layers: int = 0
    kernels: str = "te"
    fused: bool = True


# A trained policy's parameters stay in bf16 beside FP8 copies (the rows of asft_nemo/nemo/precision.py say why), and Transformer Engine
# keeps these from one micro batch to the next in two layouts: Hopper's FP8 products take one layout alone, and backward needs the other.
_FP8_POLICY = ByteWidths(compute=2, linear_weight=2 + 1 + 1, linear_input=1)
_FP8_TRAINED = ("fp8_current", "fp8_blockwise", "fp8_delayed")
WIDTHS: dict[str, ByteWidths] = {
    # No masters beside fp32 weights: two moments alone. Nothing but CPU ranks runs fp32 here, on Megatron's own layers.
    "fp32": ByteWidths(compute=4, linear_weight=4, linear_input=4, optimizer=8, kernels="local", fused=False),
    "bf16": ByteWidths(compute=2, linear_weight=2, linear_input=2),
    **{name: replace(_FP8_POLICY, edge_layers=FP8[name].edge_layers_in_bf16) for name in _FP8_TRAINED},
    # of a frozen reference alone: built without gradients, it has one layout of FP8 weights and nothing else
    "fp8": ByteWidths(compute=2, linear_weight=1, linear_input=1, edge_layers=FP8["fp8"].edge_layers_in_bf16),
}


def widths_of(run: RunConfig) -> ByteWidths:
    """Those of a run's policy, on GPUs with Transformer Engine, unless `kernels.layers` leaves its layers out."""
    widths = WIDTHS[run.precision]
    kernels = "local" if run.kernels.layers == "local" else widths.kernels
    return replace(widths, kernels=kernels, fused=widths.fused and run.kernels.fusions)


def reference_widths(run: RunConfig) -> ByteWidths:
    """Those of a frozen model's own weights: of a reference, or of psft's snapshot, which is held as the policy is."""
    asked = run.reference.precision
    widths = WIDTHS[run.precision if asked == "policy" else asked]
    # the policy's weights without their transposed FP8 copies, which backward alone reads
    return replace(widths, linear_weight=3) if asked == "policy" and run.precision in _FP8_TRAINED else widths
