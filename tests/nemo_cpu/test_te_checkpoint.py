"""A checkpoint that Transformer Engine's layers wrote: exported, a base, and resumed on ranks without it.

`tools/gpu_check.py` writes it on a GPU; without one the tests are skipped but for the checkpoint that the same code writes here, in
Megatron's own layers, which shows that they work.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import run_config
from ranks import ROOT, RankGroup
from real_runs import VALID, metrics, settings_of

from asft_nemo.checkpoint import export_hf, verify
from asft_nemo.run_dir import run_record

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

FIXTURE = ROOT / "tests" / "fixtures" / "te_checkpoint"
LAYOUT = {"parallel.tp_size": 1, "parallel.pp_size": 2, "run.world_size": 2, "precision": "bf16"}
SFT = {"objective__name": "sft", "reference__form": "none"}


@pytest.fixture(
    scope="module", params=["bf16", "fp8_delayed", pytest.param("made_here", marks=pytest.mark.long)]
)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param != "made_here":
        folder = FIXTURE / request.param
        if not folder.is_dir():
            pytest.skip("no checkpoint of Transformer Engine's layers: tools/gpu_check.py makes one on a GPU")
        return folder
    here, scratch = Path(__file__).parent, tmp_path_factory.mktemp("made")
    subprocess.run(
        [sys.executable, here / "te_checkpoint_job.py", scratch / "out", scratch / "work"],
        check=True,
        timeout=200,
        env={**os.environ, "ASFT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
    )
    return scratch / "out" / "bf16"


def test_it_is_exported_to_the_bit(checkpoint: Path, tmp_path: Path) -> None:
    export_hf(checkpoint, tmp_path / "hf")
    assert verify(checkpoint, tmp_path / "hf").identical


def test_it_is_a_base(ranks2: RankGroup, checkpoint: Path, tmp_path: Path) -> None:
    settings = {**settings_of(checkpoint, tmp_path, trainer__max_steps=1), **LAYOUT}
    ranks2.run("jobs:train_steps", settings=settings, valid=VALID)
    [line] = metrics(tmp_path)
    assert line["kl"] == 0.0, "policy and reference both start from the checkpoint's weights"


def test_it_is_resumed(ranks2: RankGroup, checkpoint: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(checkpoint, checkpoints / "step_2")
    (checkpoints / "latest").symlink_to("step_2")
    given = settings_of(checkpoint, tmp_path, trainer__max_steps=3, trainer__resume="must", **SFT)
    settings = {**given, **LAYOUT, "trainer.global_batch_size": 2}  # as it was written
    record = run_record(run_config(settings), data_fingerprint="random tokens")
    (tmp_path / "run.json").write_text(json.dumps(record))
    ranks2.run("jobs:train_steps", settings=settings, valid=VALID)
    assert [line["step"] for line in metrics(tmp_path)] == [3]
