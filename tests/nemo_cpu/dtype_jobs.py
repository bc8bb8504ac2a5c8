"""What the ranks do for the test of live dtypes."""

from __future__ import annotations

from typing import Any


def dtypes_while_training(settings: dict[str, Any], *, valid: list[int]) -> dict[str, Any]:
    """Two steps; the dtypes of everything that is kept between them, and what NeMo's plugin made of the settings."""
    from jobs import fit
    from lightning.pytorch import Callback

    found: dict[str, Any] = {"main_grad": []}

    class Look(Callback):
        def on_megatron_step_end(self, step: Any) -> None:
            chunks = step.trainer.strategy.megatron_parallel
            found["main_grad"] = _names(p.main_grad for chunk in chunks for p in chunk.parameters())

    parts = fit(settings, valid=valid, callbacks=(Look(),))
    parallel = parts.trainer.strategy.megatron_parallel
    found["parameters"] = _names(p for chunk in parallel for p in chunk.parameters())
    whole = parts.trainer.optimizers[0].mcore_optimizer
    inner = [part.optimizer for part in getattr(whole, "chained_optimizers", [whole])]
    masters = [p for one in inner for group in one.param_groups for p in group["params"]]
    found["optimizers"] = sorted(
        {type(part).__name__ for part in getattr(whole, "chained_optimizers", [whole])}
    )
    found["masters"] = _names(masters)
    for name in ("exp_avg", "exp_avg_sq"):
        found[name] = _names(
            one.state[p][name] for one in inner for g in one.param_groups for p in g["params"]
        )
    found["numbers"] = {
        "parameters": sum(p.numel() for chunk in parallel for p in chunk.parameters()),
        "masters": sum(p.numel() for p in masters),
    }
    found["params_dtype"] = [str(parts.model.config.params_dtype), str(parts.model.optim.config.params_dtype)]
    return found


def _names(tensors: Any) -> list[str]:
    return sorted({str(tensor.dtype) for tensor in tensors})
