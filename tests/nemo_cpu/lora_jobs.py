"""What the ranks do for the LoRA tests. Every function is called on all ranks with JSON arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jobs import KeepGradients, fit


def beside(run_beside: Callable[[Any, Any, Any, dict[str, int]], None]) -> Any:
    """A callback that calls `run_beside(trainer, module, micro batches, sizes)` before every step's own prepass, if it has one."""
    from lightning.pytorch import Callback

    class Beside(Callback):
        def on_megatron_step_start(self, step: Any) -> Any:
            step.prepass = Before(step, step.prepass)
            return step

    class Before:
        def __init__(self, step: Any, own: Any):
            self.step, self.own = step, own

        def feed(self, micro_batches: Any, **sizes: int) -> None:
            run_beside(self.step.trainer, self.step.pl_module, micro_batches, sizes)
            if self.own is not None:
                self.own.feed(micro_batches, **sizes)

    return Beside()


def base_copy(trainer: Any, module: Any, weights_dir: Path, *, frozen: bool) -> Any:
    """A second model with the untouched base weights, in the policy's layout and dtype."""
    from asft_nemo.nemo.gpt_model import core_chunks
    from asft_nemo.reference.frozen import frozen_config
    from asft_nemo.reference.resident import ResidentReference

    config = frozen_config(module.config)
    policy = core_chunks(trainer.strategy.megatron_parallel)
    copy = ResidentReference(
        lambda stage: config.build_chunk(vp_stage=stage, returns_hidden=True),
        vp_size=None if len(policy) == 1 else len(policy),
        weights_dir=weights_dir,
        dtype=next(policy[0].parameters()).dtype,
    )
    for chunk in copy.chunks:
        chunk.requires_grad_(not frozen)
    return copy


def watch_reference(settings: dict[str, Any], *, valid: list[int]) -> dict[str, Any]:
    """Trains with `reference=adapter_disabled`; before every step two copies of the base run over the same micro batches.

    Returns:
        By step on the last stage (empty elsewhere): the largest absolute difference of the reference's logits to those of a frozen
        copy, and of its hidden states to those of a copy whose weights ask for a gradient; and what is true of the policy's
        parameters on this rank after the run.
    """
    from asft_nemo.nemo.gpt_model import core_chunks
    from asft_nemo.nemo.lora import adapters_off
    from asft_nemo.reference.adapter_disabled import AdapterDisabledReference

    weights = Path(settings["run.dir"]) / "base" / "weights"
    copies: dict[bool, Any] = {}
    steps: list[tuple[float, float]] = []

    def compare(trainer: Any, module: Any, micro_batches: Any, sizes: Any) -> None:
        if not copies:
            copies.update(
                {frozen: base_copy(trainer, module, weights, frozen=frozen) for frozen in (True, False)}
            )
        own = AdapterDisabledReference(core_chunks(trainer.strategy.megatron_parallel), adapters_off)
        found = own.hidden(micro_batches, **sizes)
        frozen, free = (copies[is_frozen].hidden(micro_batches, **sizes) for is_frozen in (True, False))
        head, other = own.head(), copies[True].head()
        if head is not None:
            steps.append(
                (
                    max(_distance(a @ head.t(), b @ other.t()) for a, b in zip(found, frozen, strict=True)),
                    max(_distance(a, b) for a, b in zip(found, free, strict=True)),
                )
            )

    parts = fit(settings, valid=valid, callbacks=(beside(compare),))
    parallel = parts.trainer.strategy.megatron_parallel
    chunks = core_chunks(parallel)
    named = {
        f"{index}.{name}": p for index, chunk in enumerate(chunks) for name, p in chunk.named_parameters()
    }
    adapters = {name for name in named if ".adapter." in name}
    return {
        "steps": steps,
        "adapters": len(adapters),
        "trained_is_adapters": {name for name, p in named.items() if p.requires_grad} == adapters,
        "optimized": sum(len(group["params"]) for group in parts.trainer.optimizers[0].param_groups),
        "bucketed": sum(len(getattr(chunk.module, "param_to_bucket_group", {})) for chunk in parallel),
        "base_gradients": sum(
            p.grad is not None or hasattr(p, "main_grad") for name, p in named.items() if name not in adapters
        ),
        "on_again": all(m.enabled for chunk in chunks for m in chunk.modules() if hasattr(m, "to_wrap")),
        "training": all(module.training for chunk in chunks for module in chunk.modules()),
        "returns_hidden": any(chunk.returns_hidden for chunk in chunks),
    }


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def lora_gradients(settings: dict[str, Any], *, valid: list[int], out: str) -> dict[str, float]:
    """Two steps: the first moves B away from zero and is kept as a checkpoint, the second's gradients go to `out`.

    Returns the second step's logged means (where this rank has them).
    """
    settings = {**settings, "trainer.max_steps": 2, "trainer.checkpoint_every": 1, "trainer.keep": "last:2"}
    parts = fit(settings, valid=valid, callbacks=(KeepGradients(Path(out), of_step=2),))
    return dict(parts.model.training_loss_reduction.last)


def train_with_idle_reference(settings: dict[str, Any], *, valid: list[int]) -> None:
    """Trains an objective that reads no reference; a pass with adapters off runs before every step all the same."""
    from asft_nemo.nemo.gpt_model import core_chunks
    from asft_nemo.nemo.lora import adapters_off
    from asft_nemo.reference.adapter_disabled import AdapterDisabledReference

    passes: list[int] = []

    def idle(trainer: Any, module: Any, micro_batches: Any, sizes: Any) -> None:
        chunks = core_chunks(trainer.strategy.megatron_parallel)
        AdapterDisabledReference(chunks, adapters_off).hidden(micro_batches, **sizes)
        passes.append(len(micro_batches))

    fit(settings, valid=valid, callbacks=(beside(idle),))
    assert len(passes) == settings["trainer.max_steps"], passes
