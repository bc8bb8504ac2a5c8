"""Training with values that are made NaN or infinite at a chosen step, micro batch and rank. Called on all ranks with JSON arguments."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from functools import partial
from typing import Any

import torch
from jobs import fit
from torch import Tensor


def poisoned(
    settings: dict[str, Any],
    *,
    valid: list[int],
    poison: list[dict[str, Any]],
    die_after: int | None = None,
    guarded: bool = True,
    validation: int = 0,
) -> dict[str, Any]:
    """Trains with `poison` and says what became of it on this rank.

    Args:
        settings, valid, validation: see `jobs.fit`.
        poison: rows of ``what`` (a key of `POISONS`), ``step`` (from 1), ``micro_batch`` (from 0), optional ``value``, and the ranks
            ``pp_rank``, ``dp_rank``, ``tp_rank``, ``cp_rank`` it happens on (all where not given).
        die_after: a step after which every rank raises, as a killed job would end.
        guarded: False takes the guard out.

    Returns:
        ``error``: the sentence of a UserError, or None; ``digests``: of parameters and optimizer state, before the first step and after
        every one; ``gradients``: after every step, the largest absolute value in the gradient buffers.
    """
    from asft_nemo.errors import UserError

    watcher = _watcher(poison, die_after=die_after, guarded=guarded)
    error = None
    try:
        fit(settings, valid=valid, callbacks=(watcher,), validation=validation)
    except UserError as raised:
        error = str(raised)
        assert watcher.trainer.optimizers
        watcher.record(watcher.trainer)
    except RuntimeError as raised:
        if "stopped by the test" not in str(raised):
            raise
    return {"error": error, "digests": watcher.digests, "gradients": watcher.gradients}


def _watcher(poison: list[dict[str, Any]], *, die_after: int | None, guarded: bool) -> Any:
    from lightning.pytorch import Callback

    from asft_nemo.nemo.nonfinite import NonfiniteGuard

    class Watcher(Callback):
        def __init__(self) -> None:
            self.digests: list[str] = []
            self.gradients: list[float] = []
            self.step = self.micro_batch = 0
            self.batch: dict[str, Any] = {}

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.trainer = trainer
            if not guarded:
                guard = next(c for c in trainer.callbacks if isinstance(c, NonfiniteGuard))
                guard.on_train_start = lambda *_: None  # type: ignore[method-assign]
                guard.on_megatron_step_end = lambda step: None  # type: ignore[method-assign]

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            from asft_nemo.nemo.gpt_model import core_chunks

            self.digests.append(digest(trainer))
            chunks = core_chunks(trainer.strategy.megatron_parallel)
            for row in poison:
                if row["what"] in POISONS and is_here(row):
                    POISONS[row["what"]](self, chunks, row)

        def now(self, row: dict[str, Any]) -> bool:
            return self.step == row["step"] and row.get("micro_batch", self.micro_batch) == self.micro_batch

        def on_megatron_microbatch_start(self, step: Any, batch: dict[str, Any]) -> None:
            self.step = 0 if step.forward_only else step.step_i + 1
            self.micro_batch, self.batch = batch["micro_batch_index"], batch
            for row in poison:
                if row["what"] == "reference" and "ref_hidden" in batch and is_here(row) and self.now(row):
                    batch["ref_hidden"] = torch.full_like(batch["ref_hidden"], torch.nan)

        def record(self, trainer: Any) -> None:
            self.digests.append(digest(trainer))
            self.gradients.append(largest_gradient(trainer))

        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            self.record(trainer)
            if trainer.global_step == die_after:
                raise RuntimeError("stopped by the test")

    return Watcher()


def is_here(row: dict[str, Any]) -> bool:
    """Whether this rank is one of the row's."""
    from megatron.core import parallel_state

    ranks = {
        "pp_rank": parallel_state.get_pipeline_model_parallel_rank(),
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "cp_rank": parallel_state.get_context_parallel_rank(),
    }
    return all(row.get(name, rank) == rank for name, rank in ranks.items())


def _layer(watcher: Any, chunks: list[Any], row: dict[str, Any]) -> None:
    """A transformer layer's output."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        if watcher.now(row):
            hidden, *rest = output
            return (hidden * float(row.get("value", "nan")), *rest)
        return output

    chunks[row.get("chunk", 0)].decoder.layers[0].register_forward_hook(hook)


def _tokens(watcher: Any, chunks: list[Any], row: dict[str, Any], *, learned: bool) -> None:
    """The final hidden states of all tokens with a loss, or of all without (where no gradient passes)."""

    def hook(module: Any, inputs: Any, hidden_SBH: Tensor) -> Tensor:
        if not watcher.now(row):
            return hidden_SBH
        mask_SB = watcher.batch["loss_mask"].transpose(0, 1)
        if mask_SB.shape[0] != hidden_SBH.shape[0]:  # sequence parallelism: this rank's rows
            from megatron.core import parallel_state

            mask_SB = mask_SB.tensor_split(2)[parallel_state.get_tensor_model_parallel_rank()]
        return torch.where((mask_SB == learned).unsqueeze(-1), torch.nan, hidden_SBH)

    if chunks[-1].post_process:
        chunks[-1].decoder.final_layernorm.register_forward_hook(hook)


def _loss(watcher: Any, chunks: list[Any], row: dict[str, Any]) -> None:
    """The loss of a micro batch, as a sum that overflowed gives it: its gradients are finite."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        if watcher.now(row):
            return dataclasses.replace(output, loss_sum=output.loss_sum + float(row.get("value", "nan")))
        return output

    if chunks[-1].post_process:
        chunks[-1].output_layer.register_forward_hook(hook)


def _gradient(watcher: Any, chunks: list[Any], row: dict[str, Any]) -> None:
    """The gradient of one parameter, before it is added to this rank's sum."""

    def hook(gradient: Tensor) -> Tensor | None:
        return gradient * float(row.get("value", "nan")) if watcher.step == row["step"] else None

    chunks[0].decoder.layers[0].mlp.linear_fc2.weight.register_hook(hook)


POISONS = {
    "layer": _layer,
    "learned": partial(_tokens, learned=True),
    "unlearned": partial(_tokens, learned=False),
    "loss": _loss,
    "gradient": _gradient,
}


def digest(trainer: Any) -> str:
    """Of every byte of this rank's parameters, main parameters and optimizer state."""
    found = hashlib.sha256()
    for chunk in trainer.strategy.megatron_parallel:
        for parameter in chunk.parameters():
            _add(found, parameter)
    mcore = trainer.optimizers[0].mcore_optimizer
    for optimizer in getattr(mcore, "chained_optimizers", [mcore]):
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                _add(found, parameter)
                for name, value in sorted(optimizer.optimizer.state[parameter].items()):
                    found.update(name.encode())
                    _add(found, torch.as_tensor(value))
    return found.hexdigest()


def _add(found: Any, tensor: Tensor) -> None:
    found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def largest_gradient(trainer: Any) -> float:
    """The largest absolute value in this rank's gradient buffers (a number also where it is NaN)."""
    from asft_nemo.nemo.compat import grad_buffers

    buffers = [buffer for chunk in trainer.strategy.megatron_parallel for buffer in grad_buffers(chunk)]
    largest = [float(buffer.abs().max()) for buffer in buffers]
    return max(largest) if all(math.isfinite(value) for value in largest) else -1.0


def explained(reports: list[dict[str, Any]], *, num_micro_batches: int) -> str:
    """The sentence about some ranks' reports; ``seen`` as [kind, micro batch, virtual stage], rows by micro batch."""
    from asft_nemo.nemo.nonfinite import Place, RankReport, Seen, explain

    return explain(
        [
            RankReport(
                rank=report["rank"],
                dp_rank=report.get("dp_rank", 0),
                pp_rank=report.get("pp_rank", 0),
                tp_rank=report.get("tp_rank", 0),
                seen=frozenset((Seen[kind], Place(micro, stage)) for kind, micro, stage in report["seen"]),
                rows={int(key): tuple(value) for key, value in report.get("rows", {}).items()},
            )
            for report in reports
        ],
        num_micro_batches=num_micro_batches,
    )
