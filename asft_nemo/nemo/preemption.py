"""Stops training between two steps, behind a checkpoint, when any rank was told to."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback

from asft_nemo import stop_signal
from asft_nemo.nemo.callbacks import most_of_ranks
from asft_nemo.nemo.checkpoints import CheckpointCallback
from asft_nemo.run_dir import checkpoint_steps

logger = logging.getLogger(__name__)


class PreemptionCallback(Callback):
    """Looks after every step whether some rank heard a signal; then all ranks write a checkpoint and stop, at the same step.

    The run that is resumed from it goes on as if it had not stopped. Behind the last step nothing is stopped: the run is finished.

    Collectives: one all-reduce of one value a step over the world; to stop, those of a checkpoint and one all-reduce more.

    Args:
        checkpoints: writes them; comes before this callback.
    """

    def __init__(self, checkpoints: CheckpointCallback):
        self.checkpoints = checkpoints

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops when asked.

        Raises:
            asft_nemo.stop_signal.Stopped: on every rank, behind a complete checkpoint.
        """
        step = trainer.global_step
        if not most_of_ranks(float(stop_signal.heard())) or step == self.checkpoints.max_steps:
            return
        # Rank 0 wrote the newest; what the others see of a shared folder may be older.
        there = trainer.is_global_zero and step in checkpoint_steps(self.checkpoints.dir)
        if not most_of_ranks(float(there)):
            self.checkpoints.save(trainer, step, best=False)
        if trainer.is_global_zero:
            stop_signal.say_stopped(f"step {step}")
        raise stop_signal.Stopped(f"step {step}")


def preemption(checkpoints: CheckpointCallback) -> list[Callback]:
    """The callback where this process listens for a signal, else nothing."""
    return [PreemptionCallback(checkpoints)] if stop_signal.listening() else []
