"""`asft train` as a user types it, on real data: ranks started for the user, resuming, and refusals that leave nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asft_nemo import cli
from asft_nemo.config.paths import project_dir
from asft_nemo.ranks import _alive

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

LIMIT = 400  # seconds for one command, imports of NeMo on four ranks included, on a busy machine


def asft(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asft_nemo", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, cwd=project_dir())


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kill_after_first_checkpoint(words: list[str], run_dir: Path) -> None:
    """Starts `asft` and ends it and its ranks with SIGKILL as soon as a checkpoint is complete."""
    with (run_dir.parent / "log").open("wb") as log:
        command = [sys.executable, "-m", "asft_nemo", *words]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=project_dir(), start_new_session=True)
    deadline = time.monotonic() + LIMIT
    while not (run_dir / "checkpoints" / "latest").exists():
        assert process.poll() is None, (run_dir.parent / "log").read_text()[-3000:]
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.2)
    ranks = children_of_children(process.pid)
    assert len(ranks) == 4, ranks
    helpers = [helper for rank in ranks for helper in children(rank)]
    os.kill(process.pid, signal.SIGKILL)  # the launcher alone: torchrun and the ranks must notice
    process.wait()
    # a zombie does not count: who takes over the children of a killed process need not ask how they ended
    while any(_alive(pid) for pid in [*ranks, *helpers]):
        assert time.monotonic() < deadline, "the ranks went on without their launcher"
        time.sleep(0.2)


def children(parent: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def children_of_children(pid: int) -> list[int]:
    """The ranks: grandchildren of `asft train`, below torchrun."""
    return [
        rank
        for torchrun in children(pid)
        for rank in children(torchrun)
        if b"asft_nemo.ranks" in cmdline(rank)
    ]


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # a helper that has ended meanwhile
        return b""


@pytest.mark.timeout(900)
def test_gsm8k_interleaved_with_sequence_parallel_and_resume(
    data_dir: Path, tmp_path: Path, keep_logging_and_warnings: None
) -> None:
    """Killed after the first checkpoint and resumed: fp32 at TP2 x PP2 x VPP2 with sequence parallelism, as typed."""
    run_dir = tmp_path / "run"
    words = [
        "train",
        "recipe=tiny_cpu",
        "objective=asft",
        "reference=resident",
        f"data.train=[{data_dir / 'math' / 'gsm8k_train.jsonl'}]",
        "data.fields.prompt=question",
        "data.fields.response=answer",
        "data.sequence_length=512",
        "parallel.tp_size=2",
        "parallel.pp_size=2",
        "parallel.vpp_size=2",
        "parallel.sequence_parallel=true",
        "trainer.checkpoint_every=1",
        "trainer.max_steps=8",
        f"run.dir={run_dir}",
    ]
    kill_after_first_checkpoint(words, run_dir)
    before = metrics(run_dir)
    assert len(before) < 8
    assert before[0]["kl"] == 0.0
    refused = asft(*words)
    assert refused.returncode == 2
    assert "holds another run" in refused.stderr or "already holds" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr
    resumed = asft(*words, "trainer.resume=must")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "step 8/8" in resumed.stderr  # progress is shown without a terminal, too
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[0] == before[0]
    assert lines[-1]["kl"] > 0.0
    finished = asft(*words, "trainer.resume=must")
    assert finished.returncode == 0
    assert "is finished: step 8 of 8" in finished.stderr
    assert cli.main(["export", str(run_dir / "checkpoints" / "latest"), str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.train=[{tmp}/bad.jsonl]"], "bad.jsonl:2"),
        (
            ["data.train=[{tmp}/good.jsonl]", "trainer.resume=must"],
            "has no checkpoint: correct run.dir",
        ),
        (
            ["data.train=[{tmp}/good.jsonl]", "data.sequence_length=4", "data.on_too_long=drop"],
            "longer than|no example",
        ),
        (["data.train=[{tmp}/good.jsonl]", "model.path={tmp}"], "config.json"),
        (["data.train=[{tmp}/good.jsonl]", "parallel.pp_size=3"], "layers"),
        (["data.train=[{tmp}/good.jsonl]", "objektive.kl_weight=1"], "objektive"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    keep_logging_and_warnings: None,
) -> None:
    """Before any rank is started."""
    (tmp_path / "good.jsonl").write_text('{"instruction": "Say a.", "response": "a"}\n' * 4)
    (tmp_path / "bad.jsonl").write_text(
        '{"instruction": "Say a.", "response": "a"}\n{"instruction": "Say b."}\n'
    )
    run_dir = tmp_path / "run"
    given = [word.replace("{tmp}", str(tmp_path)) for word in words]
    code = cli.main(["train", "recipe=tiny_cpu", "objective=asft", f"run.dir={run_dir}", *given])
    error = capsys.readouterr().err
    assert code == 2, error
    assert re.search(said, error), error
    assert "Traceback" not in error
    assert not run_dir.exists()
