"""Training with a rank that is slow, and what W&B is told. Called on all ranks with JSON arguments."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from jobs import fit


def train_with_a_slow_rank(
    settings: dict[str, Any],
    *,
    valid: list[int],
    slow: int | None,
    from_step: int,
    usual_seconds: float,
    seconds: float,
    slow_device: int | None = None,
) -> None:
    """Trains; the first forward pass of a step takes `usual_seconds` longer on every rank, and from step `from_step` on `seconds` more on rank
    `slow`, None for no rank. What the tiny model's own work takes, and what a busy machine makes of it, is little beside either.

    The probes take `usual_seconds` on every rank, and ten times as long on rank `slow_device`, None for no rank.
    """
    from lightning.pytorch import Callback

    class Sleeper(Callback):
        rank, due = -1, 0.0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            from asft_nemo.nemo.gpt_model import core_chunks
            from asft_nemo.nemo.stragglers import StragglerCallback

            self.rank = torch.distributed.get_rank()
            core_chunks(trainer.strategy.megatron_parallel)[0].decoder.register_forward_pre_hook(self.sleep)
            (stragglers,) = (one for one in trainer.callbacks if isinstance(one, StragglerCallback))
            read, times = stragglers.probe.read, 10 if self.rank == slow_device else 1
            stragglers.probe.read = lambda: times * max(read(), usual_seconds)

        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            late = self.rank == slow and trainer.global_step + 1 >= from_step
            self.due = usual_seconds + (seconds if late else 0)

        def sleep(self, *_: Any) -> None:
            due, self.due = self.due, 0.0
            time.sleep(due)

    # its own program has 30 s to come up, which a busy machine may well take
    wandb = {"WANDB_MODE": "offline", "WANDB__SERVICE_WAIT": "150"}
    before = {name: os.environ.get(name) for name in wandb}
    os.environ.update(wandb)
    try:
        fit(settings, valid=valid, callbacks=(Sleeper(),))
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
