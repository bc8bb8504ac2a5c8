"""What a run says while it trains: metrics.jsonl, TensorBoard events, progress."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from megatron.core import parallel_state

from asft_nemo.errors import UserError
from asft_nemo.nemo.alarms import CurveAlarms
from asft_nemo.nemo.nonfinite import NonfiniteGuard
from asft_nemo.nemo.profiling import StepProfiler
from asft_nemo.nemo.progress import Progress
from asft_nemo.nemo.schedule import PrepassCallback
from asft_nemo.nemo.speed import SpeedMeter
from asft_nemo.run_dir import STARTS, append_line, drop_steps_after
from asft_nemo.stop_signal import Stopped
from asft_nemo.wandb_run import WandbRun

METRIC_KEYS = (
    "loss",
    "nll",
    "weighted_nll",
    "kl",
    "kl_reverse",
    "token_weight",
    "high_weight_share",
    "topk_entropy",
)


def is_writer() -> bool:
    """Whether this rank writes the run's metrics: the one last-stage rank that knows the loss (tensor and data rank 0)."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


def most_of_ranks(number: float) -> float:
    """The largest of all ranks' numbers. Collective over the whole world: one all-reduce of one fp64 value."""
    value = torch.tensor([number], dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return value.item()


def _strict(value: Any) -> Any:
    """The value as strict JSON can hold it: null for a number that is not finite."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a step's object under their names in TensorBoard: ``nll``, and ``nll/<domain>`` of a domain."""
    apart = {
        f"{prefix}{metric}/{domain}": value
        for prefix in ("", "validation_")
        for domain, values in line.get(f"{prefix}domains", {}).items()
        for metric, value in values.items()
    }
    return (
        (name, value)
        for name, value in {**line, **apart}.items()
        if value is not None and name not in ("step", "domains", "validation_domains")
    )


class MetricsCallback(Callback):
    """Writes one JSON object a step to metrics.jsonl and the same values as TensorBoard events; shows progress.

    `tokens` counts valid (learned) tokens of the global batch; `seconds` is the whole step, `reference_seconds` its prepass. Where the
    training data are several files, `domains` holds the metrics of each that had tokens in the step, under its name. `memory_bytes` is the
    most that this rank's allocator has held since it began, null on a CPU.

    Args:
        run_dir: folder of the run.
        prepass: tells the prepass's seconds.
        guard: tells which steps were skipped; comes before this callback.
        max_steps: of the whole run, for its progress.
        max_initial_kl: bound on the KL of the run's very first step, nats per token; None when no KL is measured.
        validate_every: steps between validations, None for none.
        speed: counts a step's operations.
        profiler: of a few steps, None for none.
        description: shown in front of the progress.
        alarms: looks at every step's values.
        wandb: gets them, too; None for no.

    Attributes:
        validated: the last step after which there was a validation.
    """

    def __init__(
        self,
        run_dir: Path,
        prepass: PrepassCallback,
        guard: NonfiniteGuard,
        *,
        max_steps: int,
        max_initial_kl: float | None,
        validate_every: int | None,
        speed: SpeedMeter,
        profiler: StepProfiler | None,
        description: str,
        alarms: CurveAlarms,
        wandb: WandbRun | None,
    ):
        self.path = run_dir / "metrics.jsonl"
        self.prepass = prepass
        self.guard = guard
        self.max_steps = max_steps
        self.max_initial_kl = max_initial_kl
        self.validate_every = validate_every
        self.speed, self.profiler = speed, profiler
        self.description = description
        self.alarms, self.wandb = alarms, wandb
        self._progress: Progress | None = None
        self._events: Any = None
        self._writes = False
        self.validated: int | None = None
        self._validation: dict[str, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Opens the files on the writing rank; after a resume, lines of steps that will be run again are dropped."""
        self._writes = is_writer()
        if self.profiler is not None and trainer.is_global_zero:
            self.profiler.say_if_past(trainer.global_step)
        if not self._writes:
            return
        self.speed.start()
        from torch.utils.tensorboard import SummaryWriter

        drop_steps_after(self.path, trainer.global_step)
        self._events = SummaryWriter(
            str(self.path.parent / "tensorboard"), purge_step=trainer.global_step + 1
        )
        self._progress = Progress(self.description, done=trainer.global_step, steps=self.max_steps)
        self._record_start(trainer)
        if self.wandb is not None:
            self.wandb.start()

    def _record_start(self, trainer: Any) -> None:
        """Adds a line to starts.jsonl: a run that was resumed has several."""
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "step": trainer.global_step,
            "max_steps": self.max_steps,
            "world_size": trainer.world_size,
            "host": socket.gethostname(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
        }
        append_line(self.path.parent / STARTS, line)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remembers the learning rate this step uses and when it began; its profile starts before the clock."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]
        if self.profiler is not None:
            self.profiler.begin(trainer, trainer.global_step + 1)
        self._started = time.perf_counter()

    def on_megatron_step_end(self, step: Any) -> None:
        """After forward and backward, before the first update: refuses a reference that is not the base.

        Collective: one all-reduce of one value.
        """
        first = step.step_i == self.guard.skipped_steps and not self.guard.skipped
        if first and not step.forward_only and self.max_initial_kl is not None:
            values = step.pl_module.training_loss_reduction.last if is_writer() else {}
            kl = most_of_ranks(abs(values.get("kl", values.get("kl_reverse", 0.0))))
            if kl > self.max_initial_kl:
                raise UserError(
                    f"the KL to the reference before the first update exceeds reference.max_initial_kl={self.max_initial_kl:g}: it is "
                    f"{kl:.3g} nats per token, for policy and reference do not start from the same weights or kernels; check model.path "
                    "and the precision, or raise the bound (reference.precision=fp8 needs one above its own rounding)"
                )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the step's object; validation, when due, adds its values to the same object."""
        seconds = time.perf_counter() - self._started
        step = trainer.global_step
        validation: dict[str, float] = {}
        reduction = pl_module.training_loss_reduction
        last = reduction.last
        if self.profiler is not None:
            self.profiler.end(self._in_words(last, seconds))
        domains: dict[str, dict[str, float]] = {}
        if self.validate_every and step % self.validate_every == 0:
            validation, domains = validate(trainer, pl_module)
            self.validated, self._validation = step, validation
        if not self._writes:
            return
        grad_norm = None if self.guard.skipped else trainer.callback_metrics.get("grad_norm")
        tokens = int(last["tokens"])
        line = {
            "step": step,
            **{key: last.get(key) for key in METRIC_KEYS},
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "lr": float(self._lr),
            "tokens": tokens,
            "seconds": seconds,
            "reference_seconds": self.prepass.reference_seconds,
            "cache_hit_rate": self.prepass.hit_rate,
            "tokens_per_second": tokens / seconds,
            **self.speed.of_step(last, seconds=seconds, hit_rate=self.prepass.hit_rate),
            "memory_bytes": torch.cuda.max_memory_allocated() or None,
            "skipped": self.guard.skipped,
            **({"domains": reduction.last_of_domains} if reduction.domains else {}),
            **{f"validation_{key}": validation.get(key) for key in METRIC_KEYS if validation},
            **({"validation_domains": domains} if domains else {}),
        }
        line = _strict(line)
        with self.path.open("a") as out:
            out.write(json.dumps(line, allow_nan=False) + "\n")
        scalars = dict(_scalars(line))
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log({"step": step, **scalars})
        assert self._progress is not None
        self._progress.show(line, self.speed.peak)
        self.alarms.look(line)

    def validation_value(self, name: str) -> float:
        """A value of the last validation by its name in metrics.jsonl; infinity where this rank does not know it."""
        return self._validation.get(name.removeprefix("validation_"), math.inf)

    def _in_words(self, last: dict[str, float], seconds: float) -> dict[str, float]:
        """The step's speed for its profile, on the rank that knows it."""
        if not self._writes:
            return {}
        return self.speed.in_words(last, seconds=seconds, hit_rate=self.prepass.hit_rate)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Closes what was opened."""
        self._close(failed=False)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same where the run ends early; one that stopped as asked has not failed."""
        self._close(failed=not isinstance(exception, Stopped))

    def _close(self, *, failed: bool) -> None:
        if self.wandb is not None:
            self.wandb.finish(failed=failed)
        if self._progress is not None:
            self._progress.close()
        if self._events is not None:
            self._events.close()


def validate(trainer: Any, pl_module: Any) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Means over the validation set by the same model, reference and loss as training, without gradients.

    Collectives: those of the forward passes and one reduction per global batch; every rank must call it.

    Returns:
        The values on the writing rank, weighted by valid tokens, and those of each validation file where there are several; elsewhere
        empty or partial dicts.
    """
    batches, count = trainer.datamodule.validation_micro_batches()
    parallel = trainer.strategy.megatron_parallel
    reduction = pl_module.validation_loss_reduction
    whole, domains = _Means(), {name: _Means() for name in reduction.domains}
    for chunk in parallel:
        chunk.eval()
    with torch.no_grad():
        for _ in range(count):
            reduction.last, reduction.last_of_domains = {}, {}
            parallel.validation_step(batches, step_i=trainer.global_step)
            whole.add(reduction.last)
            for name, values in reduction.last_of_domains.items():
                domains[name].add(values)
    for chunk in parallel:
        chunk.train()
    return whole.means(), {name: means for name, one in domains.items() if (means := one.means())}


class _Means:
    """Means over several global batches, weighted by valid tokens, whose number is under ``tokens``."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._tokens = 0

    def add(self, values: dict[str, float]) -> None:
        weight = values.get("tokens", 0)
        self._tokens += int(weight)
        for name, value in values.items():
            self._totals[name] = self._totals.get(name, 0.0) + value * weight

    def means(self) -> dict[str, float]:
        if not self._tokens:
            return {}
        means = {name: total / self._tokens for name, total in self._totals.items()}
        return {**means, "tokens": self._tokens}
