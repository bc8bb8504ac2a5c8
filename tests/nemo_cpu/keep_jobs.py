"""What ranks hold for the best checkpoint when they go on from one. Called on all ranks with JSON arguments."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MEND_SECONDS = 0.5  # the other rank is past the place by then


def saved_as_best(folders: list[str], *, resumed: int, values: list[float]) -> list[int]:
    """Starts to train behind step `resumed` and validates once a step; the steps that this rank would save.

    Args:
        folders: the run's folder as each rank's machine shows it.
        resumed: the last step that was done.
        values: what the validations give; the last rank, which writes the metrics, knows it.
    """
    import torch

    from asft_nemo.config.schema import ParallelConfig, RunConfig
    from asft_nemo.nemo.cache_job import start_ranks
    from asft_nemo.nemo.callbacks import MetricsCallback, is_writer
    from asft_nemo.nemo.checkpoints import CheckpointCallback
    from asft_nemo.nemo.keep import Keep

    start_ranks(RunConfig(parallel=ParallelConfig(pp_size=len(folders))))
    rank, saved = torch.distributed.get_rank(), list[int]()
    folder, nothing = Path(folders[rank]), SimpleNamespace()
    metrics = MetricsCallback(
        folder,
        nothing,  # type: ignore[arg-type]
        nothing,  # type: ignore[arg-type]
        max_steps=99,
        max_initial_kl=None,
        validate_every=1,
        speed=SimpleNamespace(start=lambda: time.sleep(MEND_SECONDS)),  # type: ignore[arg-type]
        profiler=None,
        description="",
        alarms=nothing,  # type: ignore[arg-type]
        wandb=None,
    )

    class Saves(CheckpointCallback):
        def save(self, trainer: Any, step: int, *, best: bool) -> None:
            saved.append(step)

    keep = Keep("best:validation_nll", folder)
    checkpoints = Saves(
        folder, folder, nothing, adapters=None, metrics=metrics, every=None, max_steps=99, keep=keep  # type: ignore[arg-type]
    )  # fmt: skip
    trainer = SimpleNamespace(
        global_step=resumed, is_global_zero=rank == 0, world_size=torch.distributed.get_world_size()
    )
    for callback in (metrics, checkpoints):
        callback.on_train_start(trainer, None)
    for value in values:
        trainer.global_step += 1
        metrics.validated = trainer.global_step
        metrics._validation = {"nll": value} if is_writer() else {}
        checkpoints.on_train_batch_end(trainer, None, None, None, 0)
    metrics._close(failed=False)
    return saved
