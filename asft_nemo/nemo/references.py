"""The frozen models of a run: its reference, in the form it asked for, and psft's snapshot of the policy. Rows, not branches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides

from asft_nemo.config.schema import RunConfig
from asft_nemo.data import Prepared
from asft_nemo.hang_watch import at
from asft_nemo.model import ModelSpec
from asft_nemo.nemo.cache import cached_reference, filling_reference
from asft_nemo.nemo.gpt_model import AnchoredGPTConfig, AnchoredGPTModel, ASFTModel, core_chunks
from asft_nemo.nemo.lora import adapters_off
from asft_nemo.nemo.precision import (
    precision_plugin,
    precision_row,
    reference_precision,
    require_kernels,
)
from asft_nemo.nemo.schedule import SNAPSHOT_FOLDER
from asft_nemo.reference import OffloadedReference, PolicySnapshot, ReferenceSource, ResidentReference
from asft_nemo.reference.adapter_disabled import AdapterDisabledReference
from asft_nemo.reference.frozen import frozen_config


def reference_config(run: RunConfig, policy: AnchoredGPTConfig) -> AnchoredGPTConfig:
    """What reference chunks are built with: the policy's config without its training hooks, in the reference's precision.

    Args:
        run: the settings.
        policy: the policy's config, with the dtypes of the run's precision already in it: equal kernels need equal configs.

    Raises:
        ConfigError: FP8 was asked for and cannot run here.
    """
    frozen, name = frozen_config(policy), reference_precision(run)
    require_kernels(name)
    plugin = None if name == run.precision else precision_plugin(name)
    return frozen if plugin is None else update_config_with_dtype_overrides(plugin.dtype_config, frozen)


def alike(chunk: AnchoredGPTModel, run: RunConfig) -> AnchoredGPTModel:
    """A frozen chunk whose weights ask for a gradient where the policy's do.

    Nothing is ever differentiated: torch and Megatron choose their kernels by it (measured: 4e-6 in the hidden states).
    """
    return chunk.requires_grad_(run.peft.name == "none")


@dataclass(frozen=True)
class Frozen:
    """What a reference is made from.

    Attributes:
        run, spec, data: settings, architecture and examples.
        model: the policy; its config is final and its chunks exist when a reference is built.
        base_dir: the base checkpoint in NeMo form.
    """

    run: RunConfig
    model: ASFTModel
    spec: ModelSpec
    data: Prepared
    base_dir: Path

    def second_copy(self, kind: type[ResidentReference] | type[OffloadedReference]) -> Any:
        """Chunks of their own with the base's weights."""
        at("loading the reference", may_take_long=True)
        config = reference_config(self.run, self.model.config)  # type: ignore[arg-type]
        return kind(
            lambda stage: alike(config.build_chunk(vp_stage=stage, returns_hidden=True), self.run),
            vp_size=self.run.parallel.vpp_size,
            weights_dir=self.base_dir / "weights",
            dtype=precision_row(reference_precision(self.run)).compute_dtype,
        )

    def adapter_disabled(self) -> ReferenceSource:
        """The policy's own base weights."""
        chunks = core_chunks(self.model.trainer.strategy.megatron_parallel)  # type: ignore[attr-defined]
        return AdapterDisabledReference(chunks, adapters_off)

    def resident(self) -> ReferenceSource:
        """A second copy on the device."""
        return self.second_copy(ResidentReference)

    def offloaded(self) -> ReferenceSource:
        """A second copy in host memory."""
        return self.second_copy(OffloadedReference)

    def cached(self) -> ReferenceSource:
        """Hidden states from disk: written before, or by this run's first epoch."""
        given = {"spec": self.spec, "data": self.data, "base_dir": self.base_dir}
        if self.run.reference.fill == "first_epoch":
            return filling_reference(self.run, self.resident, **given)  # type: ignore[arg-type]
        return cached_reference(self.run, **given)


FORMS: dict[str, Callable[[Frozen], ReferenceSource]] = {
    "adapter_disabled": Frozen.adapter_disabled,
    "resident": Frozen.resident,
    "offloaded": Frozen.offloaded,
    "cached": Frozen.cached,
}


def reference_builder(frozen: Frozen) -> Callable[[], ReferenceSource] | None:
    """A function that makes this run's reference, or None when the objective reads nothing of it."""
    if not frozen.model.config.objective.needs_reference:  # type: ignore[attr-defined]
        return None
    return lambda: FORMS[frozen.run.reference.form](frozen)


def snapshot_builder(
    run: RunConfig, model: ASFTModel, resume: Path | None
) -> Callable[[], PolicySnapshot] | None:
    """A function that makes the policy's snapshot (a resumed run's own), or None when the objective reads none."""
    if not model.config.objective.needs_old_policy:  # type: ignore[attr-defined]
        return None

    def build() -> PolicySnapshot:
        config = frozen_config(model.config)
        snapshot = PolicySnapshot(
            lambda stage: config.build_chunk(vp_stage=stage, returns_hidden=True),
            vp_size=run.parallel.vpp_size,
            dtype=precision_row(run.precision).compute_dtype,
        )
        if resume is not None:
            snapshot.load_weights(resume / SNAPSHOT_FOLDER)
        return snapshot

    return build
