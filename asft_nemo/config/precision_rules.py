"""Rules about precisions: which do not go together, and the sizes that FP8's kernels refuse."""

from __future__ import annotations

from collections.abc import Iterator

from asft_nemo.config.facts import Facts, Rule
from asft_nemo.config.fp8 import COLUMNS, FP8, OWN_WEIGHTS, asked_of
from asft_nemo.config.model_shape import ModelShape
from asft_nemo.config.schema import ReferenceConfig

_FP16 = (
    "fp16 is not supported: its smallest numbers vanish where token weights and KL gradients are small, and the loss scaling that would "
    "mend it leaves steps out"
)
_MXFP8 = "mxfp8 is not supported: its blocks of 32 are computed by GPUs of the Blackwell generation alone, and it has not been tried here"
# (key, value) -> why it is refused, for values that people know from elsewhere
WHY_NOT: dict[tuple[str, str], str] = {
    ("precision", "fp16"): f"precision={_FP16}: set precision=bf16",
    ("reference.precision", "fp16"): f"reference.precision={_FP16}: set reference.precision=policy",
    ("precision", "mxfp8"): f"precision={_MXFP8}: set precision=fp8_blockwise or precision=bf16",
    (
        "precision",
        "fp8",
    ): "precision=fp8 does not say how numbers are scaled: set precision=fp8_current, fp8_blockwise or fp8_delayed",
}


def _reference(facts: Facts) -> Iterator[str]:
    """A reference in another precision than the policy's."""
    run = facts.run
    if run.reference.form not in OWN_WEIGHTS:
        return
    own = run.reference.precision
    if own == "fp8" and run.precision == "fp32":
        yield (
            "reference.precision=fp8 beside precision=fp32 would measure FP8's rounding with a policy that has none: set precision=bf16, "
            "or reference.precision=policy"
        )
    bound = run.reference.max_initial_kl
    if own == "bf16" and run.precision in FP8 and bound <= ReferenceConfig().max_initial_kl:
        yield (
            f"reference.precision=bf16 beside precision={run.precision} starts at the KL that FP8's rounding makes, and "
            f"reference.max_initial_kl={bound:g} is a bound for equal kernels: set a larger one, or reference.precision=policy"
        )


def _history(facts: Facts) -> Iterator[str]:
    """Delayed scaling where a pass without gradients would use it.

    Transformer Engine records amaxes in every pass and turns them into scales at the end of passes with gradients alone (`autocast_exit`,
    transformer_engine/pytorch/quantization.py): a frozen model would keep the scale 1 for ever.
    """
    run, form = facts.run, facts.run.reference.form
    if run.precision not in FP8 or not FP8[run.precision].remembers:
        return
    asked = f"precision={run.precision}"
    if form == "adapter_disabled":
        yield (
            f"reference=adapter_disabled runs through the policy's layers, and with {asked} its passes would write into the scales that "
            "the policy trains with: set precision=fp8_current, or reference=resident with reference.precision=bf16"
        )
    elif form in OWN_WEIGHTS and run.reference.precision == "policy":
        yield (
            f"{asked} takes its scales from passes with gradients, and the reference has none: set reference.precision=bf16 (or fp8), or "
            "precision=fp8_current"
        )
    if run.objective.name == "psft":
        yield (
            f"{asked} takes its scales from passes with gradients, and the snapshot that objective=psft reads has none: set "
            "precision=fp8_current"
        )


def _overlap(facts: Facts) -> Iterator[str]:
    """Overlapped exchanges in other numbers than their buffers are made for.

    Blocks: `NotImplementedError` in the forward pass of transformer_engine/pytorch/module/layernorm_linear.py. Two kinds of layers: NeMo's
    callback asks Transformer Engine for buffers of one kind, FP8 or bf16 (`initialize_ub`, nemo 2.7.3).
    """
    run = facts.run
    if not run.parallel.tp_comm_overlap:
        return
    fp8 = FP8.get(run.precision)
    if run.precision == "fp8_blockwise":
        yield (
            "parallel.tp_comm_overlap=true exchanges numbers with one scale a tensor, and precision=fp8_blockwise has one a block: leave "
            "one of them out"
        )
    if fp8 is not None and fp8.edge_layers_in_bf16:
        yield (
            f"parallel.tp_comm_overlap=true exchanges through buffers of one kind, and precision={run.precision} keeps layers in bf16 beside "
            "FP8 ones: leave one of them out"
        )
    if run.reference.form in ("resident", "offloaded") and run.reference.precision not in (
        "policy",
        run.precision,
    ):
        yield (
            "parallel.tp_comm_overlap=true exchanges through buffers of one kind, and the reference runs in "
            f"reference.precision={run.reference.precision} beside precision={run.precision}: leave one of them out"
        )


def _tokens(facts: Facts) -> Iterator[str]:
    """Rows of a linear layer's input: the tokens of a micro batch on one rank."""
    length, layout = facts.run.data.sequence_length, facts.run.parallel
    parts = layout.cp_size * (layout.tp_size if layout.sequence_parallel else 1)
    if parts < 1 or length % parts:  # another rule's sentence
        return
    for asked, row in asked_of(facts.run):
        if length // parts * facts.run.trainer.micro_batch_size % row.tokens:
            nearest = -(-length // (row.tokens * parts)) * row.tokens * parts
            ranks = "ranks" if layout.cp_size > 1 else "tensor-parallel ranks"
            split = f" on each of {parts} {ranks}" if parts > 1 else ""
            yield (
                f"{asked} needs a multiple of {row.tokens} tokens in a micro batch{split}, got {facts.run.trainer.micro_batch_size} x "
                f"{length // parts}: set data.sequence_length={nearest}"
            )


def _sizes(facts: Facts) -> Iterator[str]:
    """Layers that are left for FP8, and columns of their operands on one rank."""
    shape, tp_size = facts.shape, max(1, facts.run.parallel.tp_size)
    if shape is None:
        return
    for asked, row in asked_of(facts.run):
        instead = f"{row.key}={row.instead}"
        if shape.num_layers <= 2 * row.edge_layers_in_bf16:
            yield f"{asked} keeps the first and the last layer in bf16, and the model has {shape.num_layers}: set {instead}"
        unfit = [f"{size:g} ({what})" for what, size in _columns(shape, tp_size) if size % COLUMNS]
        if unfit:
            yield (
                f"{asked} needs multiples of {COLUMNS} columns on each rank, got {', '.join(unfit)}: {_cure(shape, tp_size, instead)}"
            )


def _columns(shape: ModelShape, tp_size: int) -> tuple[tuple[str, float], ...]:
    """What is a column of some operand on one rank, forward or backward. Gate and up are two times the feed-forward columns."""
    heads, groups, channels = shape.num_attention_heads, shape.num_query_groups, shape.head_channels
    return (
        ("hidden size", shape.hidden_size),
        ("feed-forward columns", shape.ffn_hidden_size / tp_size),
        ("attention columns", heads * channels / tp_size),
        ("query, key and value columns", (heads + 2 * groups) * channels / tp_size),
    )


def _cure(shape: ModelShape, tp_size: int, instead: str) -> str:
    """The nearest smaller tensor-parallel size at which all columns fit, or no FP8."""
    sizes = range(tp_size - 1, 0, -1)
    nearest = next((n for n in sizes if not any(size % COLUMNS for _, size in _columns(shape, n))), None)
    return f"set {instead}" if nearest is None else f"set parallel.tp_size={nearest}, or {instead}"


PRECISION: tuple[Rule, ...] = (_reference, _history, _overlap, _tokens, _sizes)
