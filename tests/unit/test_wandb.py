"""What Weights & Biases is told of a run, and whether it is asked at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_files import history

from asft_nemo import wandb_run
from asft_nemo.config.schema import RunConfig, from_dict, to_dict
from asft_nemo.wandb_run import WandbRun, mode, run_id, shared_settings


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return from_dict(
        {
            "recipe": "tiny_cpu",
            "objective": {"name": "asft"},
            "reference": {"form": "resident"},
            "peft": {"name": "none"},
            "model": {"path": "model"},
            "trainer": {"wandb": "me/project"},
            "cluster": {
                "name": "slurm",
                "env": ["WANDB_API_KEY=secret"],
                "setup": ["export HF_TOKEN=secret"],
                "sbatch_args": ["comment=secret"],
            },
            "run": {"dir": str(tmp_path / "run")},
        }
    )


def test_settings_go_there_without_secrets(run: RunConfig) -> None:
    shared = shared_settings(run)
    assert "secret" not in json.dumps(shared)
    assert shared["objective"]["kl_weight"] == 0.05
    assert shared["cluster"] == {"name": "slurm", "executor": "local", "nodes": None, "gpus_per_node": 8}
    assert shared["versions"]["torch"]


@pytest.mark.parametrize(
    ("variables", "netrc", "said"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "key"}, "", "online"),
        ({"WANDB_API_KEY": "key", "WANDB_MODE": "offline"}, "", "offline"),
        ({"WANDB_MODE": "disabled"}, "", "disabled"),
        ({}, "machine api.wandb.ai login user password key\n", "online"),
        ({}, "machine other.example login user password key\n", "offline"),
        (
            {"WANDB_BASE_URL": "https://wandb.example:8080"},
            "machine wandb.example login user password key\n",
            "online",
        ),
    ],
)
def test_without_a_key_nothing_is_asked_for(
    variables: dict[str, str], netrc: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_BASE_URL", *wandb_run._KEYS):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "netrc"
    file.write_text(netrc)
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert mode() == said


def test_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    assert len(first) == 8


OFFLINE = """
import json, sys
from asft_nemo.config.schema import from_dict
from asft_nemo.wandb_run import WandbRun

run, steps = from_dict(json.loads(sys.argv[1])), json.loads(sys.argv[2])
for start in steps:
    one = WandbRun(run)
    one.start()
    for step in start:
        one.log({"step": step, "nll": 1 / step, "nll/math": 2.0})
    one.finish(failed=False)
"""


def test_offline_and_resumed(run: RunConfig, tmp_path: Path) -> None:
    """wandb itself, in a process of its own: two starts of one run, the second of which does step 3 again."""
    (tmp_path / "run").mkdir()
    given = [json.dumps(to_dict(run)), json.dumps([[1, 2, 3], [3, 4]])]
    # its own program has 30 s to come up, which a busy machine may well take
    variables = {**os.environ, "WANDB_MODE": "offline", "WANDB__SERVICE_WAIT": "150"}
    subprocess.run([sys.executable, "-c", OFFLINE, *given], check=True, timeout=200, env=variables)
    folders = sorted(
        (tmp_path / "run" / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns
    )
    id_ = (tmp_path / "run" / "wandb_id").read_text().strip()
    # offline-run-DATE_TIME-ID, and a number behind it where both starts fall into one second
    assert [folder.name.split("-")[3] for folder in folders] == [id_, id_]
    first, second = (history(folder) for folder in folders)
    assert [(one["step"], one["nll"], one["nll/math"]) for one in first] == [
        (1, 1.0, 2.0),
        (2, 0.5, 2.0),
        (3, 1 / 3, 2.0),
    ]
    assert [one["step"] for one in second] == [3, 4]
    for folder in folders:
        assert b"secret" not in b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_what_wandb_cannot_do_does_not_end_the_run(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: WandbRun, chosen: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(WandbRun, "_init", fail)
    one = WandbRun(run)
    one.start()
    one.log({"step": 1, "nll": 2.0})
    one.finish(failed=False)
    assert "W&B could not be started, the run goes on without it: no route" in caplog.text
