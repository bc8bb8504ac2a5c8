"""asft doctor: what this machine has, what is missing, and what is used instead."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from asft_nemo.commands import doctor_cluster, doctor_disks, doctor_gpus
from asft_nemo.commands.output import DONE, MENDABLE, Add, answer
from asft_nemo.config import machine
from asft_nemo.config.fp8 import FP8, fp8_missing
from asft_nemo.config.paths import project_dir

_NEEDED = ("torch", "nemo_toolkit", "megatron-core", "transformers", "safetensors", "nemo_run")
_PYTHON = (3, 11)
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
        Finding("cores, memory", f"{len(os.sched_getaffinity(0))}, {doctor_disks.gigabytes(memory)}"),
        *(Finding(*row) for row in (*doctor_disks.disks(), *doctor_gpus.gpus())),
    ]


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
