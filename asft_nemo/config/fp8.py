"""What FP8 needs, by the way its numbers are scaled: of Transformer Engine, of the GPU, and of the sizes of a product. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from asft_nemo.config import machine
from asft_nemo.config.schema import RunConfig
from asft_nemo.errors import ConfigError

Version = tuple[int, int]


@dataclass(frozen=True)
class Fp8:
    """One row.

    Attributes:
        key: the setting that asks for it.
        instead: a value of `key` that asks for no FP8 of its own.
        transformer_engine: oldest version: `get_fp8_recipe` in megatron/core/fp8_utils.py (megatron-core 0.15.3), which knows recipes by
            name from 2.1 on.
        compute_capability, cuda: oldest GPU and oldest CUDA of torch, None for any: `_compute_fp8_support` and
            `_compute_fp8_block_scaling_support` in transformer_engine/pytorch/quantization.py. On GPUs from 10.0 on Transformer Engine
            computes blockwise scaling as MXFP8 (its user guide, FP8 Blockwise Scaling).
        tokens: what a micro batch on one rank has a multiple of: 8 rows in forward (`assert_dim_for_fp8_exec`, transformer_engine/pytorch/
            utils.py); 16 where weights have gradients, in whose products tokens are what is summed over (`get_fp8_align_size`, fp8_utils.py).
        edge_layers_in_bf16: layers at each end of the model that stay in bf16.
        remembers: scales come from earlier passes, a history in every layer.
    """

    key: str
    instead: str
    transformer_engine: Version
    compute_capability: Version
    cuda: Version | None
    tokens: int
    edge_layers_in_bf16: int
    remembers: bool


FP8: dict[str, Fp8] = {
    "fp8_current": Fp8("precision", "bf16", (2, 2), (8, 9), None, 16, 1, False),
    "fp8_blockwise": Fp8("precision", "bf16", (2, 3), (9, 0), (12, 9), 16, 0, False),
    "fp8_delayed": Fp8("precision", "bf16", (2, 1), (8, 9), None, 16, 0, True),
    "fp8": Fp8("reference.precision", "policy", (2, 2), (8, 9), None, 8, 1, False),
}
# Columns of a product's operands, `assert_dim_for_fp8_exec` again. Of blocks of 128 the last may be a part: Transformer Engine tests such
# shapes (tests/pytorch/test_float8_blockwise_gemm_exact.py, "non 128x128 divisible"); its guide promises multiples of 128 alone.
COLUMNS = 16
# Forms of the reference that compute with weights of their own, in a precision of their own.
OWN_WEIGHTS = ("resident", "offloaded", "cached")


def reference_precision(run: RunConfig) -> str:
    """The precision the reference runs in: its own, or the policy's."""
    asked = run.reference.precision
    return run.precision if asked == "policy" else asked


def asked_of(run: RunConfig) -> Iterator[tuple[str, Fp8]]:
    """The rows of FP8 that a run computes in, each with the setting that asks for it."""
    own_weights = run.reference.form in OWN_WEIGHTS
    for name, used in ((run.precision, True), (run.reference.precision, own_weights)):
        if used and name in FP8:
            yield f"{FP8[name].key}={name}", FP8[name]


def fp8_missing(name: str) -> str | None:
    """What this machine lacks for a row of `FP8`, in words; None where it has all that can be seen without torch."""
    lacks = [
        what
        for what, there in (
            ("GPU", machine.gpu_count() > 0),
            ("Transformer Engine", machine.part("transformer_engine").there()),
        )
        if not there
    ]
    if lacks:
        return " and no ".join(lacks)
    oldest = FP8[name].transformer_engine
    found = re.match(r"(\d+)\.(\d+)", machine.version_of("transformer-engine") or "")
    if found and (int(found[1]), int(found[2])) < oldest:
        return f"Transformer Engine of version {dotted(oldest)} or newer"
    return None


def dotted(version: Version) -> str:
    """A version as it is written."""
    return ".".join(map(str, version))


def fp8_refusal(name: str, missing: str) -> str:
    """The sentence for a machine that lacks something for a row of `FP8`."""
    row = FP8[name]
    return (
        f"{row.key}={name} needs a GPU and Transformer Engine, and this run has no {missing}: set {row.key}={row.instead}, or "
        "run it where both are (docs/container.md)"
    )


def require_fp8(run: RunConfig) -> None:
    """For what computes the reference whatever its form is, as the job that writes a cache does.

    Raises:
        ConfigError: the reference is to run in FP8, and this machine cannot.
    """
    name = reference_precision(run)
    missing = fp8_missing(name) if name in FP8 else None
    if missing is not None:
        raise ConfigError(fp8_refusal(name, missing))


def machine_violations(run: RunConfig) -> Iterator[str]:
    """For training: a cache that a job wrote is read without the kernels that filled it."""
    reference = run.reference
    computed = reference.form in ("resident", "offloaded") or (
        reference.form == "cached" and reference.fill == "first_epoch"
    )
    for name, used in ((run.precision, True), (reference.precision, computed)):
        missing = fp8_missing(name) if used and name in FP8 else None
        if missing is not None:
            yield fp8_refusal(name, missing)


def tokens_multiple(run: RunConfig) -> int:
    """What the tokens of a micro batch on one rank should be a multiple of: what FP8 needs, or the 8 that tensor cores want."""
    names = (run.precision, run.reference.precision)
    return max([8, *(FP8[name].tokens for name in names if name in FP8)])
