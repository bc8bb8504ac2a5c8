"""`asft doctor`: what is wrong is marked and named with its cure, what is missing says what is used instead."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from asft_nemo.cli import main
from asft_nemo.commands import doctor, doctor_cluster, doctor_disks, doctor_gpus
from asft_nemo.config import machine

# What it imports, to see whether it is there, sets up logging.
pytestmark = pytest.mark.usefixtures("keep_logging_and_warnings")


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

    def version(name: str) -> str | None:
        return installed.get(names.get(name, name)) or original(name)

    monkeypatch.setattr(machine, "version_of", version)
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
    assert main(["doctor", "--json"]) == 2
    found = findings(capsys)
    assert (
        found["disk here"]["found"] == "67 MB free, too little for any run: make room or go to another disk"
    )
    assert found["disk here"]["wrong"]
    assert str(found["shared memory"]["found"]).endswith("--ipc=host or --shm-size=8g")
    assert str(tmp_path) in str(found["Hugging Face cache"]["found"])


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"HF_HOME": "/dev/null/x"}, "/dev/null is a file): set HF_HOME"),
        ({"HF_HOME": "hub"}, "hub, which is another one in every folder"),
        ({"HF_HOME": "/elsewhere", "HF_HUB_CACHE": "~/.."}, "HOME/.., "),
        ({"XDG_CACHE_HOME": "HOME/xdg"}, "HOME/xdg/huggingface, "),
        ({}, "HOME/.cache/huggingface, "),
        ({"HOME": None}, "nowhere, for this user has no home: set HF_HOME"),
    ],
)
def test_the_cache_is_where_the_hubs_tools_have_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str | None], said: str
):
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        if value is not None:
            monkeypatch.setenv(name, value.replace("HOME", str(tmp_path)))
            continue
        monkeypatch.delenv(name)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without an entry
    found = {what: words for what, words, _ in doctor_disks.disks()}
    assert (
        said.replace("HOME", str(tmp_path)) in found["Hugging Face cache"]
        or said in found["Hugging Face cache"]
    )


def test_a_folder_that_is_gone_or_not_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    (_, said, wrong), *_rest = doctor_disks.disks()
    assert wrong
    assert said.startswith(f"{tmp_path} is not writable for ")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert next(doctor_disks.disks())[1:] == ("this folder has been removed: go to one that is there", True)
    monkeypatch.chdir(tmp_path)  # what monkeypatch comes back to must be there


class Cuda:
    """torch.cuda with GPUs of these names and compute capabilities."""

    def __init__(self, *devices: tuple[str, tuple[int, int]]):
        self.devices = devices
        self.nccl = SimpleNamespace(version=lambda: (2, 28, 3))

    def is_available(self) -> bool:
        return bool(self.devices)

    def device_count(self) -> int:
        return len(self.devices)

    def get_device_name(self, index: int) -> str:
        return self.devices[index][0]

    def get_device_capability(self, index: int) -> tuple[int, int]:
        if self.devices[index][1] == (0, 0):
            raise RuntimeError("CUDA error: device is lost\nmore")
        return self.devices[index][1]


@pytest.mark.parametrize(
    ("cuda", "said", "wrong"),
    [
        (Cuda(*[("NVIDIA H100 80GB HBM3", (9, 0))] * 2), "2 x NVIDIA H100 80GB HBM3, compute capability 9.0 (FP8)", False),
        (
            Cuda(("NVIDIA A100-SXM4-40GB", (8, 0)), ("Quadro RTX 9000", (12, 0))),
            "1 x NVIDIA A100-SXM4-40GB, compute capability 8.0 (no FP8); 1 x Quadro RTX 9000, compute capability 12.0 (FP8), whose speed is not "
            "known here: mfu is null unless you give trainer.peak_tflops",
            False,
        ),
        (Cuda(), "2 that torch 9.9 cannot use: install a build of torch for CUDA, or update the driver; to do without them, set ASFT_DEVICE=cpu", True),
        (Cuda(("NVIDIA H100", (0, 0))), "2 that do not answer (CUDA error: device is lost): nvidia-smi shows more", True),
        (None, "2, and torch cannot be imported to use them (libcudart.so.13: cannot open shared object file)", True),
    ],
)  # fmt: skip
def test_gpus_are_named_and_what_keeps_them_from_being_used(
    monkeypatch: pytest.MonkeyPatch, cuda: Cuda | None, said: str, wrong: bool
):
    """Stand-ins for torch and the driver: no GPU is asked."""

    def torch(_name: str) -> SimpleNamespace:
        if cuda is None:
            raise OSError("libcudart.so.13: cannot open shared object file")
        distributed = SimpleNamespace(is_nccl_available=lambda: True)
        return SimpleNamespace(
            cuda=cuda, __version__="9.9", version=SimpleNamespace(cuda="13.0"), distributed=distributed
        )

    monkeypatch.setattr(machine, "gpu_count", lambda: 2)
    monkeypatch.setattr(doctor_gpus, "importlib", SimpleNamespace(import_module=torch))
    found = {what: (words, bad) for what, words, bad in doctor_gpus.gpus()}
    assert found["GPUs"] == (said, wrong)
    if cuda is not None and cuda.devices:
        assert found["NCCL"] == ("2.28.3, CUDA 13.0", False)


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
    hangs = "/bin/sleep 600; true"  # longer than a test may take; not exec: a site's own script before Slurm's program
    program(cluster, "sinfo", f'case "$1" in --version) echo slurm 25.05.1;; *) {hangs};; esac')
    (cluster / "sacct").unlink()
    found = dict(doctor_cluster.slurm())
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
