"""What the ranks do where a test looks at the reference. Every function is called on all ranks with JSON arguments."""

from __future__ import annotations

from typing import Any

import torch
from jobs import fit, run_config, train_itself


def describe_reference(settings: dict[str, Any], *, valid: list[int]) -> dict[str, Any]:
    """Trains, then says what is true of the reference on this rank."""
    from asft_nemo.nemo.schedule import PrepassCallback

    watcher = reference_watcher()
    parts = fit(settings, valid=valid, callbacks=(watcher,))
    prepass = next(c for c in parts.trainer.callbacks if isinstance(c, PrepassCallback))
    reference = prepass.reference
    parallel = parts.trainer.strategy.megatron_parallel
    held = {p.data_ptr() for chunk in reference.chunks for p in chunk.parameters()}
    optimizer = parts.trainer.optimizers[0]
    optimized = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
    bucketed = {
        p.data_ptr() for chunk in parallel for p in getattr(chunk.module, "param_to_bucket_group", {})
    }
    return {
        "parameters": len(held),
        "policy_parameters": len({p.data_ptr() for chunk in parallel for p in chunk.parameters()}),
        "shared_with_policy": len(held & {p.data_ptr() for chunk in parallel for p in chunk.parameters()}),
        "in_optimizer": len(held & optimized),
        "in_buckets": len(held & bucketed),
        "buckets_hold": len(bucketed),
        "with_gradient": sum(p.grad is not None for chunk in reference.chunks for p in chunk.parameters()),
        "training_mode": [chunk.training for chunk in reference.chunks],
        "checksum_before": watcher.before,
        "checksum_after": checksum(reference.chunks),
        "policy_checksum": checksum(parallel),
    }


def checksum(modules: Any) -> float:
    """A number that changes when any parameter does."""
    return sum(
        float((p.detach().double().abs() ** 1.5).sum()) for module in modules for p in module.parameters()
    )


def reference_watcher() -> Any:
    """A callback that takes the reference's checksum before the first step."""
    from lightning.pytorch import Callback

    from asft_nemo.nemo.schedule import PrepassCallback

    class Watcher(Callback):
        before = 0.0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            prepass = next(c for c in trainer.callbacks if isinstance(c, PrepassCallback))
            self.before = checksum(prepass.reference.chunks)

    return Watcher()


def has_reference(settings: dict[str, Any], *, valid: list[int]) -> bool:
    """Trains; whether a reference was built."""
    from asft_nemo.nemo.schedule import PrepassCallback

    parts = fit(settings, valid=valid)
    return next(c for c in parts.trainer.callbacks if isinstance(c, PrepassCallback)).reference is not None


def cache_itself(settings: dict[str, Any], *, repair: bool) -> None:
    """`asft_nemo.train.cache_reference`, as the launcher calls it on every rank."""
    import os

    from asft_nemo.train import cache_reference

    os.environ.pop("ASFT_LAUNCHER_PID", None)
    cache_reference(run_config(settings), repair=repair)


def train_with_a_reference_beside(settings: dict[str, Any]) -> int:
    """A run that reads nothing of a reference, with one computed before every step and thrown away. Returns how often that was."""
    import asft_nemo.nemo.build as build
    from asft_nemo.nemo.references import Frozen
    from asft_nemo.run_dir import base_checkpoint

    passes = 0
    original = build.PrepassCallback

    class Beside(original):  # type: ignore[valid-type, misc]
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_fit_start(trainer, pl_module)
            parts = {
                "run": run,
                "model": pl_module,
                "spec": None,
                "data": None,
                "base_dir": base_checkpoint(run),
            }
            self.beside = Frozen(**parts).resident()  # type: ignore[arg-type]

        def on_megatron_step_start(self, step: Any) -> Any:
            started = super().on_megatron_step_start(step)
            started.prepass = self
            return started

        def feed(self, micro_batches: list[dict[str, Any]], **shape: Any) -> None:
            nonlocal passes
            passes += 1
            self.beside.hidden(micro_batches, **shape)

    run = run_config(settings)
    build.PrepassCallback = Beside  # type: ignore[misc]
    try:
        train_itself(settings)
    finally:
        build.PrepassCallback = original  # type: ignore[misc]
    return passes


def reference_micro_batches(settings: dict[str, Any]) -> list[int]:
    """A run; returns how many micro batches the frozen model ran through in each pass."""
    from asft_nemo.reference.frozen import FrozenChunks

    found: list[int] = []
    original = FrozenChunks.hidden

    def counted(self: Any, micro_batches: Any, **shape: Any) -> Any:
        found.append(len(micro_batches))
        return original(self, micro_batches, **shape)

    FrozenChunks.hidden = counted  # type: ignore[method-assign]
    try:
        train_itself(settings)
    finally:
        FrozenChunks.hidden = original  # type: ignore[method-assign]
    return found


def reading_ahead(settings: dict[str, Any]) -> dict[str, list[list[int]]]:
    """A run with a cache; returns what this rank was told of each coming step, and which examples each step then took."""
    from asft_nemo.nemo.schedule import AnchoredStep
    from asft_nemo.reference.cached import CachedReference

    told: list[list[int]] = []
    taken: list[list[int]] = []
    ahead, step = CachedReference.read_ahead, AnchoredStep.__call__

    def kept(self: Any, sample_ids: Any) -> None:
        told.append(list(sample_ids))
        ahead(self, sample_ids)

    def watched(self: Any) -> Any:
        result = step(self)
        if not self.forward_only:
            ids = torch.cat([batch["sample_id"].flatten() for batch in seen[-1]]).unique_consecutive()
            taken.append([sample for sample in ids.tolist() if sample >= 0])
        return result

    seen: list[Any] = []
    hidden = CachedReference.hidden

    def read(self: Any, micro_batches: Any, **shape: Any) -> Any:
        seen.append(micro_batches)
        return hidden(self, micro_batches, **shape)

    CachedReference.read_ahead, CachedReference.hidden = kept, read  # type: ignore[method-assign]
    AnchoredStep.__call__ = watched  # type: ignore[method-assign]
    try:
        train_itself(settings)
    finally:
        CachedReference.read_ahead, CachedReference.hidden = ahead, hidden  # type: ignore[method-assign]
        AnchoredStep.__call__ = step  # type: ignore[method-assign]
    return {"told": told, "taken": taken}
