"""`asft train` as a user types it, on real data: ranks started for the user, resuming, and refusals that leave nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from asft_nemo.config.paths import project_dir

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

LIMIT = 240  # seconds for one command, imports of NeMo on four ranks included


def asft(*words: str, limit: int = LIMIT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asft_nemo", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=project_dir())


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(900)
def test_gsm8k_interleaved_with_sequence_parallel_and_resume(data_dir: Path, tmp_path: Path) -> None:
    """Two steps, then a third with trainer.resume=must: fp32 at TP2 x PP2 x VPP2 with sequence parallelism."""
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
        f"run.dir={tmp_path / 'run'}",
    ]
    done = asft(*words, "trainer.max_steps=2")
    assert done.returncode == 0, done.stderr[-3000:]
    first = metrics(tmp_path / "run")
    assert [line["step"] for line in first] == [1, 2]
    assert first[0]["kl"] == 0.0
    assert first[1]["kl"] > 0.0
    again = asft(*words, "trainer.max_steps=2")
    assert again.returncode == 2
    assert "holds another run" in again.stderr
    assert "Traceback" not in again.stderr
    resumed = asft(*words, "trainer.max_steps=3", "trainer.resume=must")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert metrics(tmp_path / "run")[:2] == first
    assert metrics(tmp_path / "run")[2]["kl"] > 0.0
    exported = asft("export", str(tmp_path / "run" / "checkpoints" / "latest"), str(tmp_path / "hf"))
    assert exported.returncode == 0, exported.stderr
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
def test_bad_input_is_one_sentence_and_leaves_nothing(words: list[str], said: str, tmp_path: Path) -> None:
    import re

    (tmp_path / "good.jsonl").write_text('{"instruction": "Say a.", "response": "a"}\n' * 4)
    (tmp_path / "bad.jsonl").write_text(
        '{"instruction": "Say a.", "response": "a"}\n{"instruction": "Say b."}\n'
    )
    run_dir = tmp_path / "run"
    done = asft(
        "train",
        "recipe=tiny_cpu",
        "objective=asft",
        f"run.dir={run_dir}",
        *(word.replace("{tmp}", str(tmp_path)) for word in words),
        limit=90,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert re.search(said, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not run_dir.exists()
