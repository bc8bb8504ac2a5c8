"""Runs the frozen reference ahead of each step, through NeMo's own hook; no schedule is patched.

`on_megatron_step_start` returns an `AnchoredStep`: it takes the step's micro batches from the iterator, runs the reference over them
with Megatron's forward-only schedule, hands each micro batch its reference hidden states, and then runs NeMo's step unchanged.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback
from nemo.lightning.megatron_parallel import MegatronStep

from asft_nemo.nemo.steps import data_step
from asft_nemo.reference import ReferenceSource


@dataclasses.dataclass
class AnchoredStep(MegatronStep):
    """NeMo's step, preceded by the reference's prepass.

    Attributes:
        reference: where hidden states come from; None when the objective reads nothing of it.
        report: told the seconds the prepass took.
    """

    reference: ReferenceSource | None = None
    report: Callable[[float], None] | None = None

    def __call__(self) -> list[Any]:
        assert self.num_microbatches is not None
        assert self.seq_length is not None
        assert self.micro_batch_size is not None
        micro_batches = [data_step(self.data) for _ in range(self.num_microbatches)]  # type: ignore[arg-type]
        for index, batch in enumerate(micro_batches):
            batch["micro_batch_index"] = index
        started = time.perf_counter()
        if self.reference is not None:
            hidden = self.reference.hidden(
                micro_batches, sequence_length=self.seq_length, micro_batch_size=self.micro_batch_size
            )
            head = self.reference.head()
            for batch, ref_hidden in zip(micro_batches, hidden, strict=False):  # empty before the last stage
                batch["ref_hidden"] = ref_hidden
                batch["ref_head"] = head
            torch.cuda.synchronize()
        if self.report is not None:
            self.report(time.perf_counter() - started)
        self.data = iter(micro_batches)
        return super().__call__()


class PrepassCallback(Callback):
    """Builds the reference once, after the policy is set up, and puts the prepass before every step.

    Args:
        build_reference: makes the reference, or None when nothing reads it.
    """

    def __init__(self, build_reference: Callable[[], ReferenceSource] | None):
        self._build = build_reference
        self.reference: ReferenceSource | None = None
        self.reference_seconds = 0.0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Builds the reference before a resumed checkpoint is read: it is the base in every case."""
        if self._build is not None and self.reference is None:
            self.reference = self._build()

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        """NeMo's hook: the same step with the prepass in front."""
        fields = {item.name: getattr(step, item.name) for item in dataclasses.fields(MegatronStep)}
        return AnchoredStep(**fields, reference=self.reference, report=self._record)

    def _record(self, seconds: float) -> None:
        self.reference_seconds = seconds
