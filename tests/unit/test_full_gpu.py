"""A GPU that is full ends a rank with one sentence and exit code 2, behind the traceback that says where it was. No GPU is there: torch's error is raised by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from asft_nemo import slurm_ranks
from asft_nemo.config.load import compose
from asft_nemo.config.schema import to_dict
from asft_nemo.errors import full_gpu
from asft_nemo.ranks import USER_ERROR_EXIT

FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.06 GiB is free. Process 77 has 78.04 GiB memory in use. "
    "See documentation for Memory Management (https://pytorch.org/)"
)
SENTENCE = (
    "a GPU's memory is too small for this layout (CUDA out of memory; Tried to allocate 2.00 GiB; GPU 0 has a total capacity of 79.11 GiB of which 1.06 GiB is free): "
    "lower trainer.micro_batch_size or data.sequence_length, set recompute.granularity, or divide the model over more GPUs; asft plan says what fits"
)
RANK = """
import sys
import torch
import asft_nemo.train
from asft_nemo import ranks

def train(run):
    raise torch.OutOfMemoryError({full!r})

asft_nemo.train.train = train
sys.exit(ranks.main([{jobs!r}]))
"""


def full(*_: Any) -> NoReturn:
    raise torch.OutOfMemoryError(FULL)


def test_only_a_full_gpu_is_one() -> None:
    assert str(full_gpu(torch.OutOfMemoryError(FULL), job="train")) == SENTENCE
    assert full_gpu(RuntimeError("size mismatch"), job="train") is None


@pytest.mark.parametrize("job", ["cache", "repair"])
def test_a_cache_is_given_no_cure_that_would_make_it_another_one(job: str) -> None:
    said = str(full_gpu(torch.OutOfMemoryError(FULL), job=job))
    assert said.endswith(
        "): lower reference.micro_batch_size (or trainer.micro_batch_size where it is not set), or divide the model over more GPUs"
    )


@pytest.mark.timeout(120)
def test_a_rank_hands_the_sentence_to_the_launcher(tmp_path: Path) -> None:
    run = compose(["experiment=tiny", f"run.dir={tmp_path}"], check_inputs=False)
    jobs, said = tmp_path / "jobs.json", tmp_path / "error.json"
    jobs.write_text(json.dumps([{"job": "train", "config": to_dict(run)}]))
    done = subprocess.run(
        [sys.executable, "-c", RANK.format(full=FULL, jobs=str(jobs))],
        env={"ASFT_ERROR_FILE": str(said)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == USER_ERROR_EXIT, done.stderr
    assert json.loads(said.read_text()) == {"message": SENTENCE}
    assert "in train" in done.stderr, "where it was"


def test_a_rank_of_slurm_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    said: list[str] = []
    monkeypatch.setattr("asft_nemo.ranks.leave", leave)
    monkeypatch.setattr("asft_nemo.launching.settings.refuse_other_settings", lambda run: None)
    for name, stand_in in (("_enter", lambda: None), ("set_up_logging", lambda rank: None), ("_do", full)):
        monkeypatch.setattr(slurm_ranks, name, stand_in)
    monkeypatch.setattr(slurm_ranks.stop_signal, "listen", lambda at_once: None)
    monkeypatch.setattr(slurm_ranks, "_say", said.append)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as left:
        slurm_ranks.run_rank(compose(["experiment=tiny", f"run.dir={tmp_path}"], check_inputs=False), "train")
    assert left.value.code == USER_ERROR_EXIT
    assert "Traceback" in said[0]
    assert said[1:] == [SENTENCE]
