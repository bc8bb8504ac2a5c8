"""Tables behind the rules: allowed values, ranges, what objectives read, and what is not built yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
    "data.weights_by": ("samples", "tokens"),
    "data.when_exhausted": ("repeat", "stop"),
    "data.loss_on": ("response", "last_assistant", "all_assistant", "all"),
    "data.on_bad_row": ("fail", "skip"),
    "data.on_too_long": ("drop", "truncate", "fail"),
    "recompute.granularity": ("none", "selective", "full"),
    "recompute.method": ("uniform", "block"),
    "kernels.layers": ("auto", "local"),
    "precision": ("fp32", "bf16", "fp8_current", "fp8_blockwise", "fp8_delayed"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "trainer.resume": ("never", "if_exists", "must"),
    "trainer.on_nonfinite": ("stop", "skip"),
    "cluster.executor": ("local", "slurm"),
    "cluster.gpu": ("h100-80gb", "h200", "a100-80gb", "a100-40gb"),  # the planner's
}

# key -> (smallest, largest, smallest is allowed itself); largest None = no limit; None itself passes
RANGES: dict[str, tuple[float, float | None, bool]] = {
    "objective.kl_weight": (0, None, True),
    "objective.alpha": (0, None, True),
    "objective.temperature": (0, None, True),
    "objective.exponent": (0, None, True),
    "objective.clip_low": (0, 1, True),
    "objective.clip_high": (0, None, True),
    "objective.refresh_every": (1, None, True),
    "reference.micro_batch_size": (1, None, True),
    "reference.max_initial_kl": (0, None, True),
    "peft.rank": (1, None, True),
    "peft.alpha": (0, None, False),
    "peft.dropout": (0, 1, True),
    "data.sequence_length": (2, None, True),
    "data.max_bad_rows": (1, None, True),
    "parallel.tp_size": (1, None, True),
    "parallel.pp_size": (1, None, True),
    "parallel.vpp_size": (2, None, True),
    "parallel.cp_size": (1, None, True),
    "parallel.first_stage_layers": (1, None, True),
    "parallel.last_stage_layers": (1, None, True),
    "recompute.num_layers": (1, None, True),
    "optim.lr": (0, None, False),
    "optim.warmup_ratio": (0, 1, True),
    "optim.weight_decay": (0, None, True),
    "optim.adam_beta1": (0, 1, True),
    "optim.adam_beta2": (0, 1, True),
    "optim.eps": (0, None, False),
    "optim.clip_grad": (0, None, True),
    "optim.min_lr_ratio": (0, 1, True),
    "optim.cpu_offload": (0, 1, True),
    "trainer.max_steps": (1, None, True),
    "trainer.epochs": (0, None, False),
    "trainer.global_batch_size": (1, None, True),
    "trainer.micro_batch_size": (1, None, True),
    "trainer.validate_every": (1, None, True),
    "trainer.checkpoint_every": (1, None, True),
    "trainer.max_skips": (1, None, True),
    "trainer.peak_tflops": (0, None, False),
    "alarms.straggler_factor": (1, None, False),
    "alarms.straggler_every": (1, None, True),
    "alarms.nll_factor": (1, None, False),
    "alarms.nll_window": (2, None, True),
    "alarms.max_kl": (0, None, False),
    "alarms.hang_seconds": (1, None, False),
    "run.seed": (0, 2**31 - 1, True),
    "run.world_size": (1, None, True),
    "cluster.nodes": (1, None, True),
    "cluster.gpus_per_node": (1, None, True),
    "cluster.cpus_per_task": (1, None, True),
    "cluster.signal_seconds": (10, 65535, True),  # the most that sbatch takes
    "cluster.max_requeues": (0, None, True),
    "eval.max_tokens": (1, None, True),
    "eval.batch_size": (1, None, True),
    "eval.tensor_parallel_size": (1, None, True),
    "eval.limit": (1, None, True),
    "eval.seed": (0, None, True),
}


@dataclass(frozen=True)
class ObjectiveFacts:
    """What the rules must know of an objective without importing torch.

    Tests hold it against the objective table itself.

    Attributes:
        has_divergence: it has a KL term, so `kl_weight` and `kl_direction` mean something.
        without: the same objective without its KL term.
        reads_ref_labels: it reads the reference's log probabilities of the labels, whatever its KL term.
        reads_old_labels: it reads a snapshot of the policy, likewise.
        whole_sequences: a token's weight depends on its whole sequence.
        options: the options it owns.
    """

    has_divergence: bool = False
    without: str = ""
    reads_ref_labels: bool = False
    reads_old_labels: bool = False
    whole_sequences: bool = False
    options: tuple[str, ...] = ()


OBJECTIVES: dict[str, ObjectiveFacts] = {
    "sft": ObjectiveFacts(),
    "dft": ObjectiveFacts(),
    "sft_kl": ObjectiveFacts(has_divergence=True, without="sft"),
    "asft": ObjectiveFacts(has_divergence=True, without="dft"),
    "asft_sft": ObjectiveFacts(options=("alpha",)),
    "iw_sft": ObjectiveFacts(reads_ref_labels=True, whole_sequences=True, options=("temperature",)),
    "eaft": ObjectiveFacts(options=("exponent",)),
    "psft": ObjectiveFacts(reads_old_labels=True, options=("clip_low", "clip_high", "refresh_every")),
}
OPTIONS = tuple(option for facts in OBJECTIVES.values() for option in facts.options)


class NotYet(NamedTuple):
    """A setting that has a key but no code behind it yet."""

    feature: str
    asked: Callable[[RunConfig], bool]
    instead: str


LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")

NOT_YET = (
    NotYet(
        "objective=psft with peft=lora",
        lambda run: run.objective.name == "psft" and run.peft.name == "lora",
        "set peft=none",
    ),
)
