"""A tiny checkpoint for tests that have no GPU: two steps of a model of two layers, as Transformer Engine's layers write it."""

from __future__ import annotations

import shutil
from pathlib import Path

from bench.training import FORMS, make_data, make_model, run_settings

FIXTURE = "tests/fixtures/te_checkpoint"
PRECISIONS = ("bf16", "fp8_delayed")  # the second has scales in its `_extra_state` entries
SEQUENCE_LENGTH = 64


def settings(folder: Path, run_dir: Path, precision: str) -> list[str]:
    """Of the run that writes it; `folder` holds model and data."""
    given = run_settings(
        FORMS["sft"],
        folder=folder,
        run_dir=run_dir,
        sequence_length=SEQUENCE_LENGTH,
        micro_batch_size=1,
        global_batch_size=2,
        steps=2,
    )
    return [*given, f"precision={precision}", "run.world_size=1"]


def write(out: Path, scratch: Path, precision: str) -> Path:
    """Trains and keeps the checkpoint and the steps' metrics in `out`/`precision`; returns that folder."""
    from asft_nemo.config.load import compose
    from asft_nemo.launch_local import launch

    if not (scratch / "model").exists():
        (scratch / "model").mkdir(parents=True)
        make_model(scratch / "model", hidden=64, layers=2)
        make_data(scratch / "train.jsonl", examples=8, sequence_length=SEQUENCE_LENGTH)
    run_dir, kept = scratch / precision, out / precision
    launch(compose(settings(scratch, run_dir, precision)))
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree((run_dir / "checkpoints" / "latest").resolve(), kept)
    shutil.copy(run_dir / "metrics.jsonl", kept)
    return kept


def kept(out: str, scratch: str, precision: str) -> dict[str, str]:
    """The same, for a child process, with whose end its ranks end."""
    return {"kept": str(write(Path(out), Path(scratch), precision))}


def hint(out: Path) -> str:
    """Where the tests look for it."""
    return (
        f"copy {out} to {FIXTURE} and commit it: tests/nemo_cpu/test_te_checkpoint.py then reads it on a CPU"
    )
