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
    seconds: float,
    slow_device: int | None = None,
) -> None:
    """Trains; the forward pass of rank `slow`, None for no rank, takes `seconds` longer in every micro batch from step `from_step` on.

    The probes of rank `slow_device` take ten times as long from the first step on.
    """
    from lightning.pytorch import Callback

    class Sleeper(Callback):
        step = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            from asft_nemo.nemo.gpt_model import core_chunks

            if torch.distributed.get_rank() == slow:
                core_chunks(trainer.strategy.megatron_parallel)[0].decoder.register_forward_pre_hook(
                    self.sleep
                )
            if torch.distributed.get_rank() == slow_device:
                from asft_nemo.nemo.stragglers import StragglerCallback

                (stragglers,) = (one for one in trainer.callbacks if isinstance(one, StragglerCallback))
                read = stragglers.probe.read
                stragglers.probe.read = lambda: 10 * read()

        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            self.step = trainer.global_step + 1

        def sleep(self, *_: Any) -> None:
            if self.step >= from_step:
                time.sleep(seconds)

    before = os.environ.get("WANDB_MODE")
    os.environ["WANDB_MODE"] = "offline"
    try:
        fit(settings, valid=valid, callbacks=(Sleeper(),))
    finally:
        os.environ.pop("WANDB_MODE")
        if before is not None:
            os.environ["WANDB_MODE"] = before
