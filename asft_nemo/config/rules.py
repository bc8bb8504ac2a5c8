"""Cross-field rules: rows of a table, all checked before anything heavy, all violations reported together.

A rule is a function from the facts to sentences: what is wrong, and the cure. Rules that need the model's
sizes are skipped while the model's config.json cannot be read, which is a violation of its own when inputs
are checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from asft_nemo.config import tables
from asft_nemo.config.cluster_rules import CLUSTER
from asft_nemo.config.context_rules import CONTEXT
from asft_nemo.config.data_rules import DATA
from asft_nemo.config.facts import Facts, Level, Rule
from asft_nemo.config.input_rules import INPUTS
from asft_nemo.config.kernel_rules import KERNELS
from asft_nemo.config.model_shape import ModelShape, read_model_shape
from asft_nemo.config.observing_rules import OBSERVING
from asft_nemo.config.pipeline_rules import PIPELINE
from asft_nemo.config.precision_rules import PRECISION, WHY_NOT
from asft_nemo.config.profile_rules import PROFILE
from asft_nemo.config.recipes import suggest
from asft_nemo.config.schema import EvalConfig, RunConfig, data_parallel_size, num_microbatches, walk
from asft_nemo.errors import ConfigError


def reads_reference(objective: str, kl_weight: float) -> bool:
    """Whether a run reads anything of the reference; an unknown objective is taken to."""
    facts = tables.OBJECTIVES.get(objective)
    return facts is None or facts.reads_ref_labels or (facts.has_divergence and kl_weight != 0)


def check(
    run: RunConfig,
    *,
    level_of: Mapping[str, Level] | None = None,
    shape: ModelShape | None = None,
    check_inputs: bool = False,
    launched: bool = False,
) -> None:
    """Checks every rule.

    Args:
        run: the frozen settings.
        level_of: which level gave each dotted key; None = all are the schema's.
        shape: the model's sizes; None = read from `run.model.path` where it can be read.
        check_inputs: also check files, run.dir and this machine.
        launched: also check the cluster, for `asft launch`.

    Raises:
        ConfigError: with one sentence per violation.
    """
    found: list[str] = []
    if shape is None:
        try:
            shape = read_model_shape(run.model.path)
        except ConfigError as error:
            found += error.violations if check_inputs else ()
    facts = Facts(run, shape, level_of or {}, launched)
    for row in (*SETTINGS, *(INPUTS if check_inputs else ())):
        found += row(facts)
    if found:
        raise ConfigError(found)


def _choices(facts: Facts) -> Iterator[str]:
    for key, value in walk(facts.run):
        allowed = tables.CHOICES.get(key)
        if allowed is not None and value is not None and value not in allowed:
            yield WHY_NOT.get((key, value)) or f"{key}={value} is unknown: set one of {', '.join(allowed)}"


def _ranges(facts: Facts) -> Iterator[str]:
    for key, value in walk(facts.run):
        if key not in tables.RANGES or value is None:
            continue
        smallest, largest, inclusive = tables.RANGES[key]
        low = value >= smallest if inclusive else value > smallest
        if low and math.isfinite(value) and (largest is None or value <= largest):
            continue
        bound = f"{'at least' if inclusive else 'more than'} {smallest}"
        limit = f" and at most {largest}" if largest is not None else ""
        yield f"{key}={value} is out of range: set a value of {bound}{limit}"


def _keep(facts: Facts) -> Iterator[str]:
    keep = facts.run.trainer.keep
    kind, _, what = keep.partition(":")
    number_fits = kind == "last" and what.isdecimal() and int(what) >= 1
    if not number_fits and not (kind == "best" and what):
        yield f"trainer.keep={keep} is unknown: set last:N with N at least 1, or best:<metric>"
    elif kind == "best":
        yield from _keep_best(facts.run, what)


def _keep_best(run: RunConfig, metric: str) -> Iterator[str]:
    known = tables.OBJECTIVES.get(run.objective.name)
    divergence = {"forward": "kl", "reverse": "kl_reverse"}.get(run.objective.kl_direction, "kl")
    reads = known is not None and known.has_divergence and run.objective.kl_weight
    metrics = ["loss", "nll", "weighted_nll", *([divergence] if reads else [])]
    if metric not in [f"validation_{name}" for name in metrics]:
        choices = ", ".join(f"best:validation_{name}" for name in metrics)
        yield f"trainer.keep=best:{metric} is no metric that a smaller value of is better: set one of {choices}, or last:N"
    if not (run.data.validation and run.trainer.validate_every):
        yield (
            f"trainer.keep=best:{metric} needs validations: set data.validation=[file.jsonl] and trainer.validate_every=N, or "
            "trainer.keep=last:N"
        )


def _chunk_tokens(facts: Facts) -> Iterator[str]:
    chunk = facts.run.loss.chunk_tokens
    if not _reads_chunk_tokens(facts.run):  # then it does nothing, which is another rule's sentence
        return
    if chunk != "auto" and (not isinstance(chunk, int) or chunk < 1):
        yield f"loss.chunk_tokens={chunk} is unknown: set auto or a number of tokens of at least 1"


def _reads_chunk_tokens(run: RunConfig) -> bool:
    """The fused loss does, and so does the prepass where it makes log probabilities of labels, whatever the loss."""
    known = tables.OBJECTIVES.get(run.objective.name)
    prepass = known is not None and (known.reads_ref_labels or known.reads_old_labels)
    return run.loss.implementation == "fused" or prepass


def _objective_options(facts: Facts) -> Iterator[str]:
    objective = facts.run.objective
    known = tables.OBJECTIVES.get(objective.name)
    if known is None:
        yield f"unknown objective '{objective.name}': {suggest(objective.name, tuple(tables.OBJECTIVES))}"
        return
    for option in tables.OPTIONS:
        if getattr(objective, option) is not None and option not in known.options:
            yield f"objective.{option} does nothing with objective={objective.name}: leave it out"
    for option in ("kl_weight", "kl_direction"):
        if not known.has_divergence and facts.asked(f"objective.{option}", least=Level.COMMAND_LINE):
            yield (
                f"objective.{option} does nothing with objective={objective.name}: leave it out, or set "
                "objective=asft or sft_kl"
            )


def _reference(facts: Facts) -> Iterator[str]:
    objective, form = facts.run.objective, facts.run.reference.form
    known = tables.OBJECTIVES.get(objective.name)
    reads = reads_reference(objective.name, objective.kl_weight)
    if known is not None and known.reads_ref_labels and form == "none":
        yield f"objective={objective.name} needs a reference, got reference=none: set reference=resident"
    elif known is not None and reads and form == "none":
        yield (
            f"kl_weight={objective.kl_weight:g} needs a reference, got reference=none: "
            f"set reference=resident, or objective={known.without} if you want no anchor"
        )
    if not reads and form != "none" and facts.asked("reference.form"):
        why = "with kl_weight=0 " if known is not None and known.has_divergence else ""
        yield (
            f"reference={form} was asked for but objective={objective.name} {why}reads none: set "
            "reference=none"
        )


def _adapters(facts: Facts) -> Iterator[str]:
    peft, tp_size = facts.run.peft, facts.run.parallel.tp_size
    if peft.name == "none" and facts.run.reference.form == "adapter_disabled":
        yield (
            "reference=adapter_disabled switches adapters off, and peft=none has none: set peft=lora, or "
            "reference=resident"
        )
    if facts.run.reference.form == "adapter_disabled" and facts.run.reference.precision != "policy":
        yield (
            f"reference.precision={facts.run.reference.precision} needs weights of its own, and "
            "reference=adapter_disabled runs the policy's: leave it out, or set reference=resident"
        )
    if peft.name != "lora":
        return
    unknown = [target for target in peft.targets if target not in tables.LORA_TARGETS]
    if unknown or not peft.targets or len(set(peft.targets)) < len(peft.targets):
        yield (
            f"peft.targets=[{', '.join(peft.targets)}] does not name linear layers, each once: choose from "
            f"{', '.join(tables.LORA_TARGETS)}"
        )
    if tp_size > 0 and peft.rank % tp_size:
        yield (
            f"peft.rank={peft.rank} is not a multiple of parallel.tp_size={tp_size}, which divides the adapters: set "
            f"peft.rank={math.ceil(peft.rank / tp_size) * tp_size} or lower parallel.tp_size"
        )


def _reference_micro_batches(facts: Facts) -> Iterator[str]:
    size, policy = facts.run.reference.micro_batch_size, facts.run.trainer.micro_batch_size
    if size is not None and policy > 0 and size % policy:
        yield (
            f"reference.micro_batch_size={size} is not a multiple of trainer.micro_batch_size={policy}: "
            f"set reference.micro_batch_size={max(1, round(size / policy)) * policy}"
        )


def _ignored(facts: Facts) -> Iterator[str]:
    """Settings given on purpose that the rest of the run makes meaningless."""
    run, layout = facts.run, facts.run.parallel
    form = run.reference.form
    known = tables.OBJECTIVES.get(run.objective.name)
    snapshot = known is not None and known.reads_old_labels
    rows = (
        ("reference.", ("precision", "max_initial_kl"), form == "none", "reference=none"),
        # a snapshot of the policy passes through the same prepass
        ("reference.", ("micro_batch_size",), form == "none" and not snapshot, "reference=none"),
        ("reference.", ("cache_dir", "fill"), form != "cached", f"reference={form}"),
        ("peft.", ("rank", "alpha", "dropout", "targets", "adapter"), run.peft.name == "none", "peft=none"),
        # the policy starts away from the reference, by however much
        ("reference.", ("max_initial_kl",), form != "none" and run.peft.adapter is not None, "peft.adapter"),
        (
            "loss.",
            ("chunk_tokens",),
            not _reads_chunk_tokens(run),
            f"loss.implementation={run.loss.implementation}",
        ),
        (
            "eval.",
            tuple(EvalConfig.__dataclass_fields__),
            not facts.launched,
            "asft train; asft eval has its own options",
        ),
        ("data.", ("max_bad_rows",), run.data.on_bad_row == "fail", "data.on_bad_row=fail"),
        (
            "recompute.",
            ("method", "num_layers"),
            run.recompute.granularity != "full",
            f"recompute.granularity={run.recompute.granularity}",
        ),
        (
            "recompute.",
            ("modules",),
            run.recompute.granularity != "selective",
            f"recompute.granularity={run.recompute.granularity}",
        ),
        ("trainer.", ("max_skips",), run.trainer.on_nonfinite == "stop", "trainer.on_nonfinite=stop"),
        ("optim.", ("min_lr_ratio",), run.optim.schedule == "constant", "optim.schedule=constant"),
        (
            "optim.",
            ("overlap_grad_reduce",),
            run.optim.overlap_grad_reduce and run.run.world_size == layout.tp_size * layout.pp_size,
            "one data-parallel rank",
        ),
    )
    for section, names, idle, because in rows:
        for key in (section + name for name in names):
            if idle and facts.asked(key, least=Level.COMMAND_LINE):
                yield f"{key} does nothing with {because}: leave it out"
    both = all(facts.asked(f"trainer.{name}", least=Level.COMMAND_LINE) for name in ("max_steps", "epochs"))
    if both and run.trainer.max_steps is not None:
        yield "trainer.max_steps and trainer.epochs both say how long to train: give one of them"


def _world(facts: Facts) -> Iterator[str]:
    layout, world = facts.run.parallel, facts.run.run.world_size
    ranks = layout.tp_size * layout.pp_size * layout.cp_size
    if ranks > 0 and world % ranks:
        yield (
            f"run.world_size={world} is not a multiple of tp_size x pp_size x cp_size = {layout.tp_size} x "
            f"{layout.pp_size} x {layout.cp_size} = {ranks}: set "
            f"run.world_size={ranks * max(1, world // ranks)} "
            "or change the layout"
        )


def _batches(facts: Facts) -> Iterator[str]:
    run = facts.run
    dp_size, micro = data_parallel_size(run), run.trainer.micro_batch_size
    together = micro * dp_size
    if together < 1:  # reported by the world and range rules
        return
    if run.trainer.global_batch_size % together:
        nearest = together * max(1, round(run.trainer.global_batch_size / together))
        yield (
            f"trainer.global_batch_size={run.trainer.global_batch_size} is not a multiple of "
            "micro_batch_size x "
            f"data-parallel size = {micro} x {dp_size} = {together}: set trainer.global_batch_size={nearest} "
            "or change trainer.micro_batch_size"
        )
    elif run.parallel.vpp_size is not None and num_microbatches(run) % run.parallel.pp_size:
        step = together * run.parallel.pp_size
        nearest = step * max(1, round(run.trainer.global_batch_size / step))
        yield (
            f"parallel.vpp_size needs a multiple of pp_size={run.parallel.pp_size} micro batches a step, got "
            f"{num_microbatches(run)}: set trainer.global_batch_size={nearest} "
            "or change trainer.micro_batch_size"
        )


def _sequence_parallel(facts: Facts) -> Iterator[str]:
    layout, length = facts.run.parallel, facts.run.data.sequence_length
    if not layout.sequence_parallel:
        return
    if layout.tp_size == 1:
        yield (
            "parallel.sequence_parallel=true does nothing at tp_size=1: set it to false, or "
            "parallel.tp_size=2"
        )
    if layout.tp_size > 1 and layout.cp_size == 1 and length % layout.tp_size:
        yield (
            f"data.sequence_length={length} is not a multiple of tp_size={layout.tp_size}, which "
            "sequence_parallel "
            f"needs: set data.sequence_length={math.ceil(length / layout.tp_size) * layout.tp_size}"
        )


def _model_heads(facts: Facts) -> Iterator[str]:
    shape, tp_size = facts.shape, facts.run.parallel.tp_size
    if shape is None or tp_size < 1:
        return
    limit = math.gcd(shape.num_attention_heads, shape.num_query_groups, shape.ffn_hidden_size)
    fitting = [size for size in range(1, limit + 1) if limit % size == 0]
    rows = (
        ("attention heads", shape.num_attention_heads),
        ("key/value heads", shape.num_query_groups),
        ("feed-forward columns", shape.ffn_hidden_size),
    )
    for what, number in rows:
        if number % tp_size:
            choices = ", ".join(str(size) for size in fitting)
            yield (
                f"parallel.tp_size={tp_size} does not divide the model's {number} {what}: set one of "
                f"{choices}"
            )


def _model_positions(facts: Facts) -> Iterator[str]:
    shape, length = facts.shape, facts.run.data.sequence_length
    if shape is not None and length > shape.max_positions:
        yield (
            f"data.sequence_length={length} exceeds the model's {shape.max_positions} positions: lower it "
            "to that"
        )


def _model_window(facts: Facts) -> Iterator[str]:
    shape, length = facts.shape, facts.run.data.sequence_length
    if shape is not None and shape.attention_window is not None and length > shape.attention_window:
        yield (
            f"data.sequence_length={length} exceeds the {shape.attention_window} tokens that the model attends to (sliding_window in "
            "its config.json), and training attends to all: lower it to that"
        )


def _not_yet(facts: Facts) -> Iterator[str]:
    for feature, asked, instead in tables.NOT_YET:
        if asked(facts.run):
            yield f"{feature} is not available yet: {instead}"


SETTINGS: tuple[Rule, ...] = (
    _choices,
    _ranges,
    _keep,
    _chunk_tokens,
    _objective_options,
    _reference,
    _reference_micro_batches,
    _adapters,
    *PRECISION,
    _ignored,
    *KERNELS,
    _world,
    _batches,
    *CONTEXT,
    *PIPELINE,
    _sequence_parallel,
    _model_heads,
    _model_positions,
    _model_window,
    *PROFILE,
    *OBSERVING,
    *DATA,
    *CLUSTER,
    _not_yet,
)
