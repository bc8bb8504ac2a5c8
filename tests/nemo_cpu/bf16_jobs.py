"""What the ranks do for the test of gradients in bf16."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from jobs import KeepGradients, fit, is_first_rank


def gradients_of_steps(
    settings: dict[str, Any], *, valid: list[int], out: str, size: int, megatrons_bias: bool
) -> None:
    """Trains, keeps every step's checkpoint, and leaves the gradients of every step but the first in `out/step_<number>`.

    Args:
        settings: of the run; `trainer.max_steps` says how many steps.
        valid: see `jobs.RandomTokens`.
        out: the folder.
        size: examples of an epoch.
        megatrons_bias: with Megatron's own linear layer, which rounds before it adds the bias.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from asft_nemo.nemo import layer_spec

    steps = settings["trainer.max_steps"]
    kept = {"trainer.checkpoint_every": 1, "trainer.keep": f"last:{steps}"}
    folders = {number: Path(out) / f"step_{number}" for number in range(2, steps + 1)}
    keep = tuple(KeepGradients(folder, of_step=number) for number, folder in folders.items())
    layer = mock.patch.object(layer_spec, "BiasedColumnParallelLinear", ColumnParallelLinear)
    with layer if megatrons_bias else contextlib.nullcontext():
        fit({**settings, **kept}, valid=valid, callbacks=keep, size=size)
    if is_first_rank():
        for folder in folders.values():
            shutil.copytree(
                Path(settings["run.dir"]) / "base" / "context",
                folder / "context",
                ignore=shutil.ignore_patterns("seal.json"),  # which is of the base's own weights
            )
