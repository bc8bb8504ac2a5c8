"""asft doctor: what this machine has, what is missing, and what is used instead."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from asft_nemo.commands import doctor_cluster
from asft_nemo.commands.output import DONE, MENDABLE, Add, answer
from asft_nemo.config import machine
from asft_nemo.config.fp8 import FP8, fp8_missing
from asft_nemo.config.paths import project_dir

_NEEDED = ("torch", "nemo_toolkit", "megatron-core", "transformers", "safetensors", "nemo_run")
_PYTHON = (3, 11)
_FREE_BYTES = 20 << 30  # a base, a checkpoint and an export of a 1.5B model
_SHARED_BYTES = (
    1 << 30
)  # containers have 64 MB unless told otherwise, too little for NCCL and for workers that read data
_IMAGE = "docs/container.md"


class Finding(NamedTuple):
    """One line: what was looked at, what is there, and whether it must be mended before anything works."""

    what: str
    found: str
    wrong: bool = False


def add_doctor(add: Add) -> None:
    """Adds the command."""
    add("doctor", _doctor, "what this machine has, what is missing, and what is used instead")


def _doctor(arguments: argparse.Namespace) -> int:
    findings = [*_machine(), *_packages(), *_optional(), _fp8(), *_launchers()]
    wrong = [finding for finding in findings if finding.wrong]
    width = max(len(finding.what) for finding in findings) + 2
    lines = [
        f"{'!' if finding.wrong else ' '} {finding.what:<{width}}{finding.found}" for finding in findings
    ]
    verdict = f"{len(wrong)} of these must be mended (marked !)" if wrong else "nothing needs mending"
    values: dict[str, Any] = {"findings": [finding._asdict() for finding in findings], "wrong": len(wrong)}
    answer(arguments, values, "\n".join([*lines, verdict]))
    return MENDABLE if wrong else DONE


def _machine() -> list[Finding]:
    python = platform.python_version()
    fits = sys.version_info[:2] == _PYTHON or not _pins()  # an image brings its own Python
    cure = "" if fits else f": the pins are for Python {'.'.join(map(str, _PYTHON))}, make .venv with it"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [
        Finding("system", f"{platform.system()} {platform.machine()}, {platform.node()}"),
        Finding("Python", f"{python}{cure}", wrong=not fits),
        Finding("cores, memory", f"{len(os.sched_getaffinity(0))}, {_gigabytes(memory)}"),
        *_disks(),
        Finding("GPUs", _gpus()),
        Finding("NCCL", _nccl()),
    ]


def _disks() -> Iterator[Finding]:
    """Free space where runs, downloads and shared memory go."""
    here = Path.cwd()
    yield Finding("disk here", _free(here, _FREE_BYTES, ", too little for checkpoints of any real model"))
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    there = next(folder for folder in (hub, *hub.absolute().parents) if folder.exists())
    same = os.stat(there).st_dev == os.stat(here).st_dev
    yield Finding(
        "Hugging Face cache",
        f"{hub}, {'the same disk' if same else _free(there, _FREE_BYTES, ', too little for a 7B model: set HF_HOME')}",
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        yield Finding(
            "shared memory",
            _free(shared, _SHARED_BYTES, ": start the container with --ipc=host or --shm-size=8g"),
        )


def _free(folder: Path, enough: int, low: str) -> str:
    free = shutil.disk_usage(folder).free
    return f"{_gigabytes(free)} free{low if free < enough else ''}"


def _gpus() -> str:
    """The GPUs by name, asked of torch, which must be able to use them."""
    if machine.forced_to_cpu():
        return "left alone, for ASFT_DEVICE=cpu: everything runs on CPU ranks (gloo), to try it and not for speed"
    count = machine.gpu_count()
    if not count:
        return "none: everything runs on CPU ranks (gloo), to try it and not for speed"
    import torch

    if not torch.cuda.is_available():
        return f"{count} that torch {torch.__version__} cannot use: install a build of torch for CUDA, or update the driver"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    major, minor = torch.cuda.get_device_capability()
    fp8 = "FP8" if (major, minor) >= (8, 9) else "no FP8"
    return f"{', '.join(f'{names.count(name)} x {name}' for name in dict.fromkeys(names))}, compute capability {major}.{minor} ({fp8})"


def _nccl() -> str:
    """Its version as torch was built with it, asked only where there are GPUs: importing torch takes seconds."""
    if not machine.gpu_count():
        return "not used: CPU ranks talk by gloo"
    import torch

    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return f"missing in torch {torch.__version__}: {_IMAGE} has it, and so has a build of torch for CUDA"
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[attr-defined]
    return f"{version}, CUDA {torch.version.cuda}"


def _packages() -> list[Finding]:
    """What nothing works without, beside the pins of this checkout; an image has none, and is taken as it is."""
    pins = _pins()
    cure = "make venv" if pins else f"it is in NVIDIA's NeMo container, {_IMAGE}"
    found = []
    for name in _NEEDED:
        version, pinned = machine.version_of(name), pins.get(_normal(name))
        if version is None:
            found.append(Finding(name, f"missing: {cure}", wrong=True))
        elif pinned is not None and version.partition("+")[0] != pinned:
            found.append(Finding(name, f"{version}, but {pinned} is what was tested: make venv", wrong=True))
        else:
            found.append(Finding(name, version))
    return found


def _pins() -> dict[str, str]:
    """Pinned versions by distribution; empty outside a checkout.

    Those of requirements/base.txt, or those with one of the compat_*.txt before them where these are the versions installed.
    """
    folder = project_dir() / "requirements"
    base = _pinned(folder / "base.txt")
    for file in sorted(folder.glob("compat_*.txt")):
        other = _pinned(file)
        if base and all(machine.version_of(name) == version for name, version in other.items()):
            return base | other
    return base


def _pinned(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    pairs = re.findall(r"^([\w.-]+)==([\w.]+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {_normal(name): version for name, version in pairs}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _optional() -> list[Finding]:
    found = []
    for row in machine.OPTIONAL:
        if row.there():
            found.append(Finding(row.name, f"{row.version() or 'there'}: {row.gives}"))
        else:
            found.append(Finding(row.name, f"missing, so {row.without}. To have it: {row.get}"))
    return [*found, Finding("fused Adam", machine.adam())]


def _fp8() -> Finding:
    """Which precisions in FP8 are not refused for what is missing here; what the GPU itself can is in the line of the GPUs."""
    missing = {name: fp8_missing(name) for name, row in FP8.items() if row.key == "precision"}
    can = [name for name, lacks in missing.items() if lacks is None]
    if can:
        return Finding("FP8", ", ".join(can))
    return Finding("FP8", f"none, for there is no {next(iter(missing.values()))}: docs/container.md has both")


def _launchers() -> list[Finding]:
    """Slurm, and programs of containers that are on the path."""
    programs = ("docker", "podman", "apptainer", "enroot")
    containers = ", ".join(name for name in programs if shutil.which(name))
    cluster = [Finding(what, found) for what, found in doctor_cluster.slurm()]
    return [*cluster, Finding("containers", containers or "none on the path")]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
