"""What the ranks do for the LoRA tests. Every function is called on all ranks with JSON arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jobs import KeepGradients, fit


def watch_reference(settings: dict[str, Any], *, valid: list[int], frozen: bool) -> dict[str, Any]:
    """Trains with `reference=adapter_disabled`; before every step a resident copy of the base runs over the same micro batches.

    Args:
        settings: of the run.
        valid: of the data.
        frozen: the copy's parameters require no gradient, as the policy's base weights.

    Returns:
        By step, whether all hidden states of the last stage are the copy's bit for bit and the largest difference (None elsewhere),
        and what is true of the policy's parameters on this rank after the run.
    """
    from lightning.pytorch import Callback

    from asft_nemo.nemo.gpt_model import core_chunks
    from asft_nemo.nemo.schedule import PrepassCallback
    from asft_nemo.reference.frozen import frozen_config
    from asft_nemo.reference.resident import ResidentReference

    steps: list[Any] = []

    class Beside(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            config = frozen_config(pl_module.config)
            copy = ResidentReference(
                lambda stage: config.build_chunk(vp_stage=stage, returns_hidden=True),
                vp_size=settings.get("parallel.vpp_size"),
                weights_dir=Path(settings["run.dir"]) / "base" / "weights",
                dtype=next(core_chunks(trainer.strategy.megatron_parallel)[0].parameters()).dtype,
            )
            for chunk in copy.chunks:
                chunk.requires_grad_(not frozen)
            prepass = next(c for c in trainer.callbacks if isinstance(c, PrepassCallback))
            reference: Any = prepass.reference
            policy_hidden = reference.hidden

            def both(micro_batches: Any, **sizes: Any) -> Any:
                expected = copy.hidden(micro_batches, **sizes)
                found = policy_hidden(micro_batches, **sizes)
                pairs = list(zip(found, expected, strict=True))
                steps.append(
                    [
                        all(torch.equal(one, other) for one, other in pairs),
                        max(float((one - other).abs().max()) for one, other in pairs),
                    ]
                    if pairs
                    else None
                )
                return found

            reference.hidden = both

    parts = fit(settings, valid=valid, callbacks=(Beside(),))
    parallel = parts.trainer.strategy.megatron_parallel
    chunks = core_chunks(parallel)
    named = {name: p for chunk in chunks for name, p in chunk.named_parameters()}
    adapters = {name for name in named if ".adapter." in name}
    optimized = {p for group in parts.trainer.optimizers[0].param_groups for p in group["params"]}
    return {
        "steps": steps,
        "adapters": len(adapters),
        "trained_is_adapters": {name for name, p in named.items() if p.requires_grad} == adapters,
        "optimized": len(optimized),
        "bucketed": sum(len(getattr(chunk.module, "param_to_bucket_group", {})) for chunk in parallel),
        "base_gradients": sum(
            p.grad is not None or hasattr(p, "main_grad") for name, p in named.items() if name not in adapters
        ),
        "on_again": all(m.enabled for chunk in chunks for m in chunk.modules() if hasattr(m, "to_wrap")),
        "training": all(chunk.training for chunk in chunks),
        "returns_hidden": any(chunk.returns_hidden for chunk in chunks),
    }


def lora_gradients(settings: dict[str, Any], *, valid: list[int], out: str) -> dict[str, float]:
    """Two steps: the first moves the adapters away from zero and is kept as a checkpoint, the second's gradients go to `out`.

    Returns the second step's logged means (where this rank has them).
    """
    settings = {**settings, "trainer.max_steps": 2, "trainer.checkpoint_every": 1, "trainer.keep": "last:2"}
    parts = fit(settings, valid=valid, callbacks=(KeepGradients(Path(out), of_step=2),))
    return dict(parts.model.training_loss_reduction.last)
