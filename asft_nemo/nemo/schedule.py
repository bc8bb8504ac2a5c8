"""Runs the prepass ahead of each step, through NeMo's own hook; no schedule is patched.

`on_megatron_step_start` returns an `AnchoredStep`: it takes the step's micro batches from the iterator, lets the prepass run the
frozen reference (and the policy's snapshot) over them with Megatron's forward-only schedule, and then runs NeMo's step unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from nemo.lightning.megatron_parallel import MegatronStep

from asft_nemo.nemo.gpt_model import AnchoredGPTConfig, core_chunks
from asft_nemo.nemo.hangs import has_its_micro_batches
from asft_nemo.nemo.prepass import Prepass
from asft_nemo.nemo.steps import data_step
from asft_nemo.reference import PolicySnapshot, ReferenceSource
from asft_nemo.reference.cached import FillingReference

logger = logging.getLogger(__name__)

SNAPSHOT_FOLDER = "old_policy"


@dataclasses.dataclass
class AnchoredStep(MegatronStep):
    """NeMo's step, preceded by the prepass.

    Attributes:
        prepass: what the micro batches get first; None when the objective reads nothing but the policy.
        report: told the seconds that taking the micro batches took, and those of the prepass.
    """

    prepass: Prepass | None = None
    report: Callable[[float, float], None] | None = None

    def __call__(self) -> list[Any]:
        assert self.num_microbatches is not None
        assert self.seq_length is not None
        assert self.micro_batch_size is not None
        began = time.perf_counter()
        micro_batches = [data_step(self.data) for _ in range(self.num_microbatches)]  # type: ignore[arg-type]
        for index, batch in enumerate(micro_batches):
            batch["micro_batch_index"] = index
        started = time.perf_counter()
        if self.report is not None:
            has_its_micro_batches()
        if self.prepass is not None:
            self.prepass.feed(
                micro_batches, sequence_length=self.seq_length, micro_batch_size=self.micro_batch_size
            )
            torch.cuda.synchronize()
        if self.report is not None:
            self.report(started - began, time.perf_counter() - started)
        self.data = iter(micro_batches)
        return super().__call__()


class PrepassCallback(Callback):
    """Builds the frozen models once, after the policy is set up, and puts the prepass before every step.

    Args:
        config: the policy's.
        build_reference: makes the reference, or None when nothing reads it.
        build_snapshot: makes the snapshot of the policy, or None when nothing reads it.
        reference_micro_batch_size: examples of one of the reference's micro batches, None for the policy's.
        sample_ids_of_step: which examples this data-parallel rank takes in a step; None where no reference reads ahead.
    """

    def __init__(
        self,
        config: AnchoredGPTConfig,
        build_reference: Callable[[], ReferenceSource] | None,
        build_snapshot: Callable[[], PolicySnapshot] | None,
        *,
        reference_micro_batch_size: int | None,
        sample_ids_of_step: Callable[[int], list[int]] | None = None,
    ):
        self._sample_ids_of_step = sample_ids_of_step
        self._ref_micro_batch_size = reference_micro_batch_size
        self._config = config
        self._build_reference, self._build_snapshot = build_reference, build_snapshot
        self.reference: ReferenceSource | None = None
        self.snapshot: PolicySnapshot | None = None
        self.reference_seconds = 0.0
        self.data_seconds = 0.0
        self.hit_rate: float | None = None
        self.prepass: Prepass | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Builds what is read. The reference is the base in every case."""
        sources: dict[str, ReferenceSource] = {}
        if self._build_reference is not None:
            self.reference = sources["ref"] = self._build_reference()
        if self._build_snapshot is not None:
            self.snapshot = sources["old"] = self._build_snapshot()
        if sources:
            config = self._config
            self.prepass = Prepass(
                objective=config.objective,
                shard=config.vocab_shard(),
                chunk_tokens=config.loss_chunk_tokens,
                sources=sources,
                ref_micro_batch_size=self._ref_micro_batch_size,
                vp_size=config.virtual_pipeline_model_parallel_size,
                pp_size=config.pipeline_model_parallel_size,
            )

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        """NeMo's hook: the same step with the prepass in front."""
        report = None  # a validation says nothing of the step before it
        if not step.forward_only:
            assert step.step_i is not None
            report = functools.partial(self._record, step.step_i)
            if self.reference is not None:
                self.reference.start_step(step.step_i)
            if self.snapshot is not None:
                self._refresh_when_due(self.snapshot, step)
        fields = {item.name: getattr(step, item.name) for item in dataclasses.fields(MegatronStep)}
        return AnchoredStep(**fields, prepass=self.prepass, report=report)

    def _refresh_when_due(self, snapshot: PolicySnapshot, step: MegatronStep) -> None:
        assert step.step_i is not None
        if step.step_i % int(self._config.objective.options["refresh_every"]):
            return
        for chunk in step.pipeline:
            wrapper: Any = chunk.module
            if wrapper.ddp_config.overlap_param_gather:  # parameters may still be on their way to this rank
                wrapper.start_param_sync(force_sync=True)
        snapshot.refresh(core_chunks(step.pipeline))
        logger.info("step %d: snapshot of the policy refreshed", step.step_i + 1)

    def save_snapshot(self, checkpoint: Path) -> None:
        """Writes the snapshot beside a checkpoint's weights; nothing where there is none. Collective over all ranks."""
        if self.snapshot is not None:
            if torch.distributed.get_rank() == 0:
                (checkpoint / SNAPSHOT_FOLDER).mkdir()
            torch.distributed.barrier()
            self.snapshot.save(checkpoint / SNAPSHOT_FOLDER)

    def finish_writing(self) -> None:
        """Makes durable what the reference has written so far."""
        if isinstance(self.reference, FillingReference):
            self.reference.finish()

    def _record(self, step: int, data_seconds: float, reference_seconds: float) -> None:
        self.data_seconds, self.reference_seconds = data_seconds, reference_seconds
        if self.reference is not None:
            self.hit_rate = self.reference.hit_rate
            if self._sample_ids_of_step is not None:
                self.reference.read_ahead(self._sample_ids_of_step(step + 1))
