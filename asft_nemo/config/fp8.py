"""What a reference in FP8 needs: of this machine, of the other settings, and of the model's sizes."""

from __future__ import annotations

from collections.abc import Iterator

from asft_nemo.config import machine
from asft_nemo.config.model_shape import ModelShape
from asft_nemo.config.schema import RunConfig
from asft_nemo.errors import ConfigError

# `assert_dim_for_fp8_exec` of Transformer Engine: rows a multiple of 8, columns of 16, for every operand of a linear layer.
_ROWS, _COLUMNS = 8, 16
_LAYERS_IN_BF16 = 2  # the first and the last: see the row `fp8` in asft_nemo/nemo/precision.py


def fp8_missing() -> str | None:
    """What this machine lacks for FP8, in words; None where it has all. Imports nothing heavy."""
    lacks = [
        what
        for what, there in (
            ("GPU", machine.gpu_count() > 0),
            ("Transformer Engine", machine.part("transformer_engine").there()),
        )
        if not there
    ]
    return " and no ".join(lacks) or None


def fp8_refusal(missing: str) -> str:
    """The sentence for a machine that lacks something for FP8."""
    return (
        f"reference.precision=fp8 needs a GPU and Transformer Engine, and this run has no {missing}: set reference.precision=policy, or "
        "run it where both are (docs/container.md)"
    )


def require_fp8(run: RunConfig) -> None:
    """For what computes the reference whatever its form is, as the job that writes a cache does.

    Raises:
        ConfigError: the reference is to run in FP8, and this machine cannot.
    """
    missing = fp8_missing()
    if run.reference.precision == "fp8" and missing is not None:
        raise ConfigError(fp8_refusal(missing))


def machine_violations(run: RunConfig) -> Iterator[str]:
    """For training: a cache that a job wrote is read without the kernels that filled it."""
    reference, missing = run.reference, fp8_missing()
    computed = reference.form in ("resident", "offloaded") or (
        reference.form == "cached" and reference.fill == "first_epoch"
    )
    if reference.precision == "fp8" and computed and missing is not None:
        yield fp8_refusal(missing)


def settings_violations(run: RunConfig, shape: ModelShape | None) -> Iterator[str]:
    """What does not go together with a reference in FP8, and sizes that its kernels refuse."""
    if run.reference.precision != "fp8" or run.reference.form not in ("resident", "offloaded", "cached"):
        return
    if run.precision == "fp32":
        yield (
            "reference.precision=fp8 beside precision=fp32 would measure FP8's rounding with a policy that has none: set precision=bf16, "
            "or reference.precision=policy"
        )
    yield from _tokens(run)
    if shape is not None:
        yield from _sizes(run, shape)


def _tokens(run: RunConfig) -> Iterator[str]:
    """Rows of a linear layer's input: the tokens of a micro batch on one rank."""
    length, layout = run.data.sequence_length, run.parallel
    parts = layout.cp_size * (layout.tp_size if layout.sequence_parallel else 1)
    if parts < 1 or length % parts:  # another rule's sentence
        return
    if length // parts * run.trainer.micro_batch_size % _ROWS:
        nearest = -(-length // (_ROWS * parts)) * _ROWS * parts
        ranks = "ranks" if layout.cp_size > 1 else "tensor-parallel ranks"
        split = f" on each of {parts} {ranks}" if parts > 1 else ""
        yield (
            f"reference.precision=fp8 needs a multiple of {_ROWS} tokens in a micro batch{split}, got {run.trainer.micro_batch_size} x "
            f"{length // parts}: set data.sequence_length={nearest}"
        )


def _sizes(run: RunConfig, shape: ModelShape) -> Iterator[str]:
    """Layers that are left for FP8, and columns of their weights on one rank."""
    if shape.num_layers <= _LAYERS_IN_BF16:
        yield (
            f"reference.precision=fp8 keeps the first and the last layer in bf16, and the model has {shape.num_layers}: set "
            "reference.precision=policy"
        )
    tp_size = max(1, run.parallel.tp_size)
    rows = (("hidden size", shape.hidden_size), ("feed-forward columns", shape.ffn_hidden_size / tp_size))
    for what, size in rows:
        if size % _COLUMNS:
            yield (
                f"reference.precision=fp8 needs a multiple of {_COLUMNS} {what} on each rank, got {size:g}: set "
                "reference.precision=policy, or change parallel.tp_size"
            )
