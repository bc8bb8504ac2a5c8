"""How fast a step was, in operations a second: what metrics.jsonl says of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from asft_nemo.config.devices import peak_tflops
from asft_nemo.config.model_shape import ModelShape
from asft_nemo.config.schema import RunConfig
from asft_nemo.cpu import backend
from asft_nemo.planner.flops import Computed, StepFlops, step_flops

logger = logging.getLogger(__name__)


class SpeedMeter:
    """Operations a second and GPU, from what a step computed on and how long it took.

    Args:
        run: the settings.
        shape: the model's sizes.
    """

    def __init__(self, run: RunConfig, shape: ModelShape):
        self._run, self._shape = run, shape
        self.peak: float | None = None

    def start(self) -> None:
        """Finds out what a GPU here can do; says so where that is not known."""
        self.peak = self._run.trainer.peak_tflops
        if self.peak is None and not backend.active():
            name = torch.cuda.get_device_name()
            self.peak = peak_tflops(name, self._run.precision)
            if self.peak is None:
                logger.info(
                    "mfu is null: what a %s does at most in %s is not known here; give trainer.peak_tflops=N, in 10^12 operations a second",
                    name,
                    self._run.precision,
                )

    def of_step(
        self, last: Mapping[str, float], *, seconds: float, hit_rate: float | None
    ) -> dict[str, float | None]:
        """The step's values of metrics.jsonl.

        Args:
            last: of the loss reduction: ``positions``, ``attended``, ``tokens``.
            seconds: of the whole step, its reference included.
            hit_rate: of the reference's cache.

        Returns:
            ``tflops_per_gpu``, the policy's forward and backward; ``reference_tflops_per_gpu``, the frozen models' passes; ``mfu``, the
            policy's share of what the GPU can do, null where that is not known.
        """
        flops = self._flops(last, hit_rate)
        per_gpu = 1e12 * seconds * self._run.run.world_size
        policy = flops.policy / per_gpu
        return {
            "tflops_per_gpu": policy,
            "reference_tflops_per_gpu": flops.frozen / per_gpu,
            "mfu": None if self.peak is None else policy / self.peak,
        }

    def in_words(
        self, last: Mapping[str, float], *, seconds: float, hit_rate: float | None
    ) -> dict[str, float]:
        """The same for a profile's page, by NeMo's convention, too."""
        by_convention = self._flops(last, hit_rate).policy_by_convention / (
            1e12 * seconds * self._run.run.world_size
        )
        own = self.of_step(last, seconds=seconds, hit_rate=hit_rate)
        known = {name: value for name, value in own.items() if value is not None}
        return {**known, "tflops_per_gpu with the head at every position, as NeMo counts": by_convention}

    def _flops(self, last: Mapping[str, float], hit_rate: float | None) -> StepFlops:
        computed = Computed(positions=last["positions"], attended=last["attended"], learned=last["tokens"])
        return step_flops(self._run, self._shape, computed, hit_rate=hit_rate)
