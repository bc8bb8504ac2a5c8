"""What was measured on, and the result of `tools/gpu_check.py` as JSON and Markdown."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.gpu_parts import Part, bars_table

_QUERY = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory", "ecc.mode.current")
_PACKAGES = ("torch", "triton", "transformer-engine", "liger-kernel", "nvidia-modelopt")


def machine() -> dict[str, Any]:
    """What was measured on."""
    import torch
    from torch.cuda import nccl

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "gpus": [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices],
        "compute_capability": [f"{device.major}.{device.minor}" for device in devices],
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl.version())) if devices else None,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **_driver(),
    }


def _driver() -> dict[str, str | None]:
    """What nvidia-smi says of the first GPU; None where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(_QUERY)
    return dict(zip(_QUERY, (word.strip() for word in said.split(",")), strict=False))


def versions() -> dict[str, str | None]:
    """Of what decides the numbers; also where the training stack is not installed."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    try:
        from asft_nemo.run_dir import versions as of_runs
    except ImportError:
        return found
    return {**found, **of_runs()}


def commit() -> str | None:
    """Of this tree; None where that cannot be told."""
    try:
        from asft_nemo.run_dir import git_commit
    except ImportError:
        return None
    return git_commit()


def page(record: Mapping[str, Any], parts: Sequence[Part]) -> str:
    """The whole result as Markdown."""
    on = record["machine"]
    known = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    options = ", ".join(
        f"{key}={value}" for key, value in record["options"].items() if not isinstance(value, list)
    )
    counts = Counter(row["verdict"] for row in record["bars"])
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("passed", "missed", "unmeasured"))
    where = "; ".join(on["gpus"]) or "no GPU: a rehearsal on the CPU at small sizes, whose times say nothing"
    lines = [
        f"# GPU check, {record['date']}",
        "",
        f"{where}; CUDA {on['cuda']}, driver {on['driver_version']}. {known}. Commit {record['commit']}.",
        "",
        f"`{record['command']}`; {record['minutes']:.1f} minutes. Options: {options}.",
        "",
        f"## Bars: {said}",
        "",
        bars_table(record["bars"]),
    ]
    for part in parts:
        result = record["parts"].get(part.name)
        if result is None:
            continue
        took = f" ({result['seconds']:.0f} s)" if "seconds" in result else ""
        lines += ["", f"## {part.title}", "", f"`{part.name}`: {result['status']}{took}"]
        if "reason" in result:
            lines[-1] += f": {result['reason']}"
        if "found" in result:
            lines += ["", _table(part, result["found"])]
    return "\n".join([*lines, ""])


def _table(part: Part, found: Mapping[str, Any]) -> str:
    """What a part found as Markdown; a table that breaks takes neither the JSON file nor the other parts with it."""
    try:
        return part.table(found)
    except Exception as error:
        return f"Its table cannot be made ({type(error).__name__}: {error}); the JSON file has what it found."


def write(record: Mapping[str, Any], parts: Sequence[Part], out: Path, name: str) -> None:
    """`out`/`name`.json and .md, whole or not at all."""
    texts = {".json": json.dumps(record, indent=2) + "\n", ".md": page(record, parts)}
    for suffix, text in texts.items():
        partial = out / f".{name}{suffix}"
        partial.write_text(text)
        partial.replace(out / f"{name}{suffix}")


def anything_wrong(record: Mapping[str, Any]) -> bool:
    """Whether a part failed or a bar was missed; what was skipped or not measured is neither."""
    failed = any(result["status"] == "failed" for result in record["parts"].values())
    return failed or any(row["verdict"] == "missed" for row in record["bars"])
