"""Learning-rate schedules as rows over NeMo's own policies: linear warm-up, then the row's decay to `min_lr`."""

from __future__ import annotations

from typing import Any

from nemo.core.optim import lr_scheduler as nemo_policies
from nemo.lightning.pytorch.optim import LRSchedulerModule

from asft_nemo.errors import ConfigError

SCHEDULES: dict[str, tuple[type, dict[str, Any]]] = {
    "cosine": (nemo_policies.CosineAnnealing, {"constant_steps": 0}),
    "linear": (nemo_policies.PolynomialDecayAnnealing, {"power": 1.0}),
    "constant": (nemo_policies.WarmupPolicy, {}),
}


class WarmupSchedule(LRSchedulerModule):
    """One of `SCHEDULES`, stepped once an optimizer step.

    Args:
        name: row of `SCHEDULES`.
        max_steps: steps of the whole run.
        warmup_steps: steps of linear warm-up; step s of it uses lr * s / (warmup_steps + 1).
        min_lr: where the decay ends.
    """

    def __init__(self, name: str, *, max_steps: int, warmup_steps: int, min_lr: float):
        super().__init__()
        if name not in SCHEDULES:
            raise ConfigError(f"optim.schedule={name} is unknown: choose one of {', '.join(SCHEDULES)}")
        self.name, self.max_steps, self.warmup_steps, self.min_lr = name, max_steps, warmup_steps, min_lr

    def scheduler(self, model: Any, optimizer: Any) -> dict[str, Any]:
        """Lightning's description of the schedule, stepped per optimizer step."""
        policy, options = SCHEDULES[self.name]
        schedule = policy(
            optimizer, max_steps=self.max_steps, warmup_steps=self.warmup_steps, min_lr=self.min_lr, **options
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1},
        }
