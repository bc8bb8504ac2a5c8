"""What a rank really holds while it trains, counted storage by storage."""

from __future__ import annotations

import gc
from typing import Any


def measure(settings: dict[str, Any], *, valid: list[int]) -> dict[str, int]:
    """Two steps; bytes of the second, when the optimizer's state is there, by the names of `asft_nemo.planner.memory.StageMemory`."""
    from jobs import fit
    from lightning.pytorch import Callback

    from asft_nemo.nemo.simulate.meter import LiveBytes

    meter = LiveBytes()
    found: dict[str, int] = {}

    class Watch(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            gc.collect()
            self.span = meter.begin()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            meter.end(self.span)
            found.update(_held(trainer), peak=self.span.peak)

    with meter:
        parts = fit(settings, valid=valid, callbacks=(Watch(),))
    reference, prepass = parts.prepass.reference, parts.prepass.prepass
    found["reference"] = reference.held().device
    found["reference_hidden"] = sum(prepass.kept_bytes.values())
    return found


def _held(trainer: Any) -> dict[str, int]:
    parameters = [p for chunk in trainer.strategy.megatron_parallel for p in chunk.parameters()]
    [optimizer] = trainer.optimizers
    states = [t for state in optimizer.mcore_optimizer.optimizer.state.values() for t in state.values()]
    return {
        "parameters": sum(p.numel() for p in parameters),
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.main_grad.nbytes for p in parameters),
        "optimizer": sum(t.nbytes for t in states if getattr(t, "ndim", 0)),
    }
