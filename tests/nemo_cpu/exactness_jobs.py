"""What the ranks do for a case of the exactness matrix. Called on all ranks with JSON arguments."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from exactness_faults import FAULTS
from head_gradient_jobs import small_buckets
from jobs import KeepGradients, examples, fit, is_first_rank, run_config


def step(
    settings: dict[str, Any], *, valid: list[int], size: int, out: str, fault: str | None = None
) -> None:
    """Two steps; the first moves the policy away from the reference and is kept as a checkpoint, the second's gradients go to `out`.

    A cache that a job writes is written first, at the run's own layout. `fault` is a key of `exactness_faults.FAULTS`.
    """
    settings = {**settings, "trainer.max_steps": 2, "trainer.checkpoint_every": 1, "trainer.keep": "last:2"}
    if settings["reference.form"] == "cached" and settings["reference.fill"] == "job":
        write_cache(settings, valid=valid, size=size)
    made = contextlib.nullcontext() if fault is None else FAULTS[fault].made()
    with made, small_buckets():  # several buckets, so that some are reduced while backward still runs
        fit(settings, valid=valid, size=size, callbacks=(KeepGradients(Path(out), of_step=2),))
    if is_first_rank():
        shutil.copytree(
            Path(settings["model.path"]) / "context",
            Path(out) / "context",
            ignore=shutil.ignore_patterns("seal.json"),  # which is of the base's own weights
        )


def write_cache(settings: dict[str, Any], *, valid: list[int], size: int) -> None:
    """The frozen base's hidden states of all examples, as `asft cache-reference` writes them."""
    from asft_nemo.model import read_model_spec
    from asft_nemo.nemo import cache_job
    from asft_nemo.run_dir import base_checkpoint

    os.environ.pop("ASFT_LAUNCHER_PID", None)
    run = run_config(settings)
    base_dir = base_checkpoint(run)
    data: Any = SimpleNamespace(
        train=examples(run, size, valid), validation=None, max_steps=1, fingerprint="random tokens"
    )
    spec = read_model_spec(base_dir / "context" / "hf")
    cache_job.cache_reference(run, spec=spec, data=data, base_dir=base_dir, repair=False)
