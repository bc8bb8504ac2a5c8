"""`asft doctor`: what is wrong is marked and named with its cure, what is missing says what is used instead."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from asft_nemo.cli import main
from asft_nemo.commands import doctor, doctor_cluster
from asft_nemo.config import machine


def findings(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    return {row["what"]: row for row in json.loads(capsys.readouterr().out)["findings"]}


def test_every_optional_part_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        machine.importlib.util, "find_spec", lambda name: object() if name == "apex" else None
    )
    assert main(["doctor", "--json"]) == 0
    found = findings(capsys)
    for row in machine.OPTIONAL:
        said = found[row.name]["found"]
        missing = f"missing, so {row.without}. To have it: {row.get}"
        assert said == (f"there: {row.gives}" if row.name == "apex" else missing)
    assert {"flash-attn", "apex", "transformer-engine"} <= set(found)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (("transformer_engine", "apex"), "transformer-engine's FusedAdam"),
        (("apex",), "apex's FusedAdam"),
        ((), "none, so torch's AdamW: apex or transformer-engine has one"),
    ],
)
def test_the_adam_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], said: str
):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: object() if name in there else None)
    main(["doctor", "--json"])
    assert findings(capsys)["fused Adam"]["found"] == said


@pytest.mark.parametrize(
    ("gpus", "version", "said"),
    [
        (0, "2.8.0", "none, for there is no GPU: docs/container.md has both"),
        (1, "2.8.0", "fp8_current, fp8_blockwise, fp8_delayed"),
        (1, "2.2.0", "fp8_current, fp8_delayed"),
    ],
)
def test_fp8_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, gpus: int, version: str, said: str
):
    original = machine.version_of
    monkeypatch.setattr(machine, "gpu_count", lambda: gpus)
    monkeypatch.setattr(machine.Part, "there", lambda self: True)
    monkeypatch.setattr(
        machine, "version_of", lambda name: version if name == "transformer-engine" else original(name)
    )
    main(["doctor", "--json"])
    assert findings(capsys)["FP8"]["found"] == said


def test_a_package_off_its_pin_must_be_mended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    versions = {"torch": None, "megatron-core": "0.1.0"}
    original = machine.version_of
    monkeypatch.setattr(machine, "version_of", lambda name: versions.get(name, original(name)))
    assert main(["doctor", "--json"]) == 2
    found = findings(capsys)
    assert found["torch"] == {"what": "torch", "found": "missing: make venv", "wrong": True}
    assert found["megatron-core"]["found"] == "0.1.0, but 0.15.3 is what was tested: make venv"
    assert not found["transformers"]["wrong"]


def test_another_python_must_be_mended(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    assert main(["doctor"]) == 2
    assert "! Python" in capsys.readouterr().out


def test_gpus_are_left_alone_where_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASFT_DEVICE", "cpu")
    assert main(["doctor"]) == 0
    assert "left alone, for ASFT_DEVICE=cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("installed", "right"),
    [
        ({"nemo_toolkit": "2.6.2", "megatron-core": "0.15.3"}, True),
        ({"nemo_toolkit": "2.7.3", "megatron-core": "0.16.1"}, True),
        ({"nemo_toolkit": "2.6.2", "megatron-core": "0.16.1"}, False),
    ],
)
def test_pairs_that_were_tried_are_right(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], right: bool
):
    original = machine.version_of
    names = {"nemo-toolkit": "nemo_toolkit"}
    monkeypatch.setattr(
        machine, "version_of", lambda name: installed.get(names.get(name, name), original(name))
    )
    wrong = [row.what for row in doctor._packages() if row.wrong]
    assert wrong == ([] if right else ["megatron-core"])


def test_an_image_is_taken_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """No pins beside the package: its Python and its versions are the image's own."""
    monkeypatch.setattr(doctor, "project_dir", lambda: tmp_path)
    monkeypatch.setattr(sys, "version_info", (3, 12, 3))
    monkeypatch.setattr(machine, "version_of", lambda name: None if name == "nemo_run" else "9.9")
    assert main(["doctor", "--json"]) == 2
    found = findings(capsys)
    assert [name for name, row in found.items() if row["wrong"]] == ["nemo_run"]
    assert found["nemo_run"]["found"] == "missing: it is in NVIDIA's NeMo container, docs/container.md"
    assert found["megatron-core"]["found"] == "9.9"


def test_little_room_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(64 << 20))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "there" / "yet"))
    main(["doctor", "--json"])
    found = findings(capsys)
    assert found["disk here"]["found"] == "0.1 GB free, too little for checkpoints of any real model"
    assert found["shared memory"]["found"].endswith("--ipc=host or --shm-size=8g")
    assert str(tmp_path) in str(found["Hugging Face cache"]["found"])


def program(folder: Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path with stand-ins for Slurm's commands and nothing else."""
    for name in doctor_cluster.PROGRAMS:
        program(tmp_path, name, "exit 0")
    program(
        tmp_path,
        "sinfo",
        'case "$1" in --version) echo slurm 25.05.1;; *) echo gpu; echo cpu; echo gpu;; esac',
    )
    program(tmp_path, "srun", "echo '      --container-image=IMAGE  [pyxis] the image'")
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_a_cluster_with_pyxis(cluster: Path):
    assert dict(doctor_cluster.slurm()) == {
        "Slurm": "slurm 25.05.1",
        "Slurm's controller": "answers; partitions: cpu, gpu",
        "pyxis": "srun has --container-image: cluster=slurm_pyxis",
    }


def test_a_cluster_that_lacks_things(cluster: Path, monkeypatch: pytest.MonkeyPatch):
    """No pyxis, one program missing, and a controller that never answers: said in time."""
    monkeypatch.setattr(doctor_cluster, "SECONDS", 0.3)
    program(cluster, "srun", "echo usage")
    program(cluster, "sinfo", 'case "$1" in --version) echo slurm 25.05.1;; *) exec /bin/sleep 30;; esac')
    (cluster / "sacct").unlink()
    started = time.monotonic()
    found = dict(doctor_cluster.slurm())
    assert time.monotonic() - started < 10
    assert found["Slurm"] == "slurm 25.05.1; sacct missing: asft launch needs them (Debian: slurm-client)"
    assert found["Slurm's controller"] == "does not answer (sinfo did not answer in 0.3 s)"
    assert found["pyxis"].startswith("srun has no --container-image")


def test_slurm_without_its_settings_and_none_at_all(cluster: Path, monkeypatch: pytest.MonkeyPatch):
    program(cluster, "sinfo", "echo 'sinfo: fatal: no configuration' >&2; exit 1")
    found = dict(doctor_cluster.slurm())
    assert "not configured (sinfo: fatal: no configuration)" in found["Slurm"]
    assert "does not answer" in found["Slurm's controller"]
    monkeypatch.setenv("PATH", str(cluster / "empty"))
    assert [what for what, _ in doctor_cluster.slurm()] == ["Slurm"]
