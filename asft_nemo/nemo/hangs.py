"""Where a training run is, told to the watch over its ranks (`asft_nemo.hang_watch`)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from asft_nemo.hang_watch import at


class HangCallback(Callback):
    """Tells the places of a run.

    Comes before all other callbacks, so that what they do behind a step (validation, checkpoints) is not taken for a part of it.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The process groups are there."""
        at("building the model", may_take_long=True)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The model and its optimizer are there; a reference, adapters and what a resumed run goes on from are read."""
        at("what it reads before training", may_take_long=True)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """All is read."""
        at("what precedes its first step", may_take_long=True)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step begins: this rank takes its micro batches, and waits for those of others."""
        at(f"step {trainer.global_step + 1}, taking its micro batches", waits=True)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """What follows may take as long as it takes on all ranks."""
        at(f"what follows step {trainer.global_step}")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Nobody waits any more."""
        at("its end", may_take_long=True)


def has_its_micro_batches() -> None:
    """Told by the step: from here on this rank waits for others, and they for it."""
    at("its passes over the micro batches", waits=True)
