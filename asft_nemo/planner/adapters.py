"""Bytes that LoRA's adapters keep of a micro batch for their backward pass, beside what the frozen layers under them keep."""

from __future__ import annotations

from asft_nemo.config.schema import RunConfig
from asft_nemo.model.spec import ModelSpec
from asft_nemo.planner.parameters import linear_rows
from asft_nemo.planner.precision import ByteWidths
from asft_nemo.planner.tokens import Tokens

_MASK = 1  # bytes of a place of a dropout mask: torch's kernel on GPUs keeps booleans
COLUMN = ("linear_qkv", "linear_fc1")  # divided by outputs: every rank has the whole input of its tokens


def adapter_bytes(run: RunConfig, spec: ModelSpec, widths: ByteWidths) -> dict[str, int]:
    """What each adapter of one layer keeps: its input, the dropout mask, the low-rank numbers between its two matrices.

    NeMo's `ParallelLinearAdapter` (nemo 2.7.3) switches sequence parallelism off in its own layers: what it keeps of an input that ranks
    share is the gathered one, T tokens on every rank, where the layer under it keeps T / t and gathers again in backward.

    Args:
        run: settings.
        spec: architecture.
        widths: bytes of numbers, and which kernels.

    Returns:
        Bytes by target; nothing without adapters.
    """
    if run.peft.name != "lora":
        return {}
    return {target: _kept(target, run, spec, widths) for target in run.peft.targets}


def _kept(target: str, run: RunConfig, spec: ModelSpec, widths: ByteWidths) -> int:
    tokens, c, column = Tokens.of(run), widths.compute, target in COLUMN
    width = linear_rows(spec)[target][0] // (1 if column else run.parallel.tp_size)
    between = tokens.whole * run.peft.rank * c
    if run.peft.dropout:
        # Transformer Engine's fused norm hands over its gathered output, unless buffers of the overlap hold that: dropped before it is
        # gathered, as without Transformer Engine, only the rank's own tokens have a mask.
        gathered = not column or (widths.kernels == "te" and not run.parallel.tp_comm_overlap)
        return (
            between + tokens.whole * width * c + (tokens.whole if gathered else tokens.shared) * width * _MASK
        )
    if target == "linear_proj" and widths.kernels == "te":
        return between  # flash attention keeps its output itself
    return between + tokens.whole * width * c
