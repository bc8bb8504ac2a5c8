"""Tables behind the rules: allowed values, ranges, what objectives read, and what is not built yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from asft_nemo.config.schema import RunConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "objective.kl_direction": ("forward", "reverse"),
    "reference.form": ("none", "adapter_disabled", "resident", "offloaded", "cached"),
    "reference.precision": ("policy", "bf16", "fp8"),
    "reference.fill": ("job", "first_epoch"),
    "peft.name": ("none", "lora"),
    "loss.implementation": ("fused", "vocab_parallel", "dense"),
    "loss.normalize_by": ("tokens", "micro_batch"),
    "data.template": ("alpaca", "chat", "raw"),
    "data.loss_on": ("response", "last_assistant", "all_assistant", "all"),
    "data.on_bad_row": ("fail", "skip"),
    "data.on_too_long": ("drop", "truncate", "fail"),
    "precision": ("fp32", "bf16", "fp8_current", "fp8_blockwise", "fp8_delayed"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "trainer.resume": ("never", "if_exists", "must"),
    "trainer.on_nonfinite": ("stop", "skip"),
    "cluster.name": ("local",),
}

# key -> (smallest, largest, smallest is allowed itself); largest None = no limit; a value None is never checked
RANGES: dict[str, tuple[float, float | None, bool]] = {
    "objective.kl_weight": (0, None, True),
    "reference.micro_batch_size": (1, None, True),
    "reference.max_initial_kl": (0, None, True),
    "peft.rank": (1, None, True),
    "peft.alpha": (0, None, False),
    "peft.dropout": (0, 1, True),
    "data.sequence_length": (2, None, True),
    "parallel.tp_size": (1, None, True),
    "parallel.pp_size": (1, None, True),
    "parallel.vpp_size": (2, None, True),
    "parallel.cp_size": (1, None, True),
    "optim.lr": (0, None, False),
    "optim.warmup_ratio": (0, 1, True),
    "optim.weight_decay": (0, None, True),
    "optim.adam_beta1": (0, 1, True),
    "optim.adam_beta2": (0, 1, True),
    "optim.eps": (0, None, False),
    "optim.clip_grad": (0, None, True),
    "optim.min_lr_ratio": (0, 1, True),
    "trainer.max_steps": (1, None, True),
    "trainer.epochs": (0, None, False),
    "trainer.global_batch_size": (1, None, True),
    "trainer.micro_batch_size": (1, None, True),
    "trainer.validate_every": (1, None, True),
    "trainer.checkpoint_every": (1, None, True),
    "run.seed": (0, 2**31 - 1, True),
    "run.world_size": (1, None, True),
    "eval.max_tokens": (1, None, True),
    "eval.batch_size": (1, None, True),
    "eval.limit": (1, None, True),
}


@dataclass(frozen=True)
class ObjectiveFacts:
    """What the rules must know of an objective without importing torch; tests hold it against the objective table itself."""

    has_divergence: bool
    without: str = ""  # the objective to take when one wants no anchor
    options: frozenset[str] = frozenset()


# Objectives that are not listed here are left to the objective table.
OBJECTIVES: dict[str, ObjectiveFacts] = {
    "sft": ObjectiveFacts(has_divergence=False),
    "dft": ObjectiveFacts(has_divergence=False),
    "sft_kl": ObjectiveFacts(has_divergence=True, without="sft"),
    "asft": ObjectiveFacts(has_divergence=True, without="dft"),
}
OPTIONS = ("alpha", "temperature", "exponent", "clip_low", "clip_high", "refresh_every")

# Features that have a key but no code behind it yet: (what it is, whether the run asks for it, what to do instead).
NOT_YET: tuple[tuple[str, Callable[[RunConfig], bool], str], ...] = (
    (
        "reference=adapter_disabled",
        lambda run: run.reference.form == "adapter_disabled",
        "set reference=resident",
    ),
    ("reference=offloaded", lambda run: run.reference.form == "offloaded", "set reference=resident"),
    ("reference=cached", lambda run: run.reference.form == "cached", "set reference=resident"),
    (
        "a reference.precision other than the policy's",
        lambda run: run.reference.precision != "policy",
        "set reference.precision=policy",
    ),
    ("peft=lora", lambda run: run.peft.name == "lora", "set peft=none"),
    (
        "loss.implementation=fused",
        lambda run: run.loss.implementation == "fused",
        "set loss.implementation=vocab_parallel",
    ),
    ("data.template=chat", lambda run: run.data.template == "chat", "set data.template=alpaca or raw"),
    ("data.packing=true", lambda run: run.data.packing, "set data.packing=false"),
    (
        "data.weights",
        lambda run: bool(run.data.weights),
        "leave data.weights empty: every example is then seen once an epoch",
    ),
    (
        "loss on chosen turns",
        lambda run: run.data.loss_on.endswith("_assistant"),
        "set data.loss_on=response or all",
    ),
    ("data.validation", lambda run: bool(run.data.validation), "leave it empty and measure with asft eval"),
    (
        "trainer.validate_every",
        lambda run: run.trainer.validate_every is not None,
        "leave it null and measure with asft eval",
    ),
    ("trainer.keep=best:...", lambda run: run.trainer.keep.startswith("best:"), "set trainer.keep=last:N"),
    (
        "trainer.on_nonfinite=skip",
        lambda run: run.trainer.on_nonfinite == "skip",
        "set trainer.on_nonfinite=stop",
    ),
    ("context parallelism", lambda run: run.parallel.cp_size > 1, "set parallel.cp_size=1"),
    ("FP8 training", lambda run: run.precision.startswith("fp8"), "set precision=bf16"),
    (
        "evaluation within a training run",
        lambda run: bool(run.eval.suites),
        "run asft eval on the exported model",
    ),
)
