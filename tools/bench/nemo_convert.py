"""NeMo's own importer and exporter beside ours, where Transformer Engine, whose names they depend on, is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

_NEMO = """
import sys
from nemo.collections import llm
hf, nemo, back = sys.argv[2:]
if sys.argv[1] == "import":
    llm.import_ckpt(model=llm.Qwen2Model(llm.Qwen2Config500M()), source=f"hf://{hf}", output_path=nemo)
else:
    llm.export_ckpt(path=nemo, target="hf", output_path=back)
"""


def measure(hf_dir: Path, scratch: Path) -> list[dict[str, object]]:
    """Seconds and peak resident bytes of both directions, each in a process of its own; a reason where one did not run.

    Args:
        hf_dir: a Qwen2 checkpoint with tokenizer files.
        scratch: an empty folder.
    """
    ours, nemo = (
        [str(scratch / name) for name in ("ours", "ours_hf")],
        [str(scratch / name) for name in ("nemo", "nemo_hf")],
    )
    asft = [sys.executable, "-m", "asft_nemo"]
    rows = [
        _row("asft import", [*asft, "import", str(hf_dir), ours[0]]),
        _row("asft export", [*asft, "export", *ours]),
    ]
    for direction in ("import", "export"):
        title = f"NeMo {direction}_ckpt"
        if importlib.util.find_spec("transformer_engine") is None:
            rows.append({"what": title, "skipped": "Transformer Engine is not installed"})
        else:
            rows.append(_row(title, [sys.executable, "-c", _NEMO, direction, str(hf_dir), *nemo]))
    return rows


def _row(title: str, command: list[str]) -> dict[str, object]:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        return {"what": title, "skipped": f"ended with exit code {process.returncode}"}
    return {"what": title, "seconds": time.perf_counter() - started, "peak_rss_bytes": usage.ru_maxrss * 1024}


def table(rows: list[dict[str, object]]) -> str:
    """The rows as Markdown."""
    lines = ["| | seconds | peak RSS, MiB |", "| --- | --- | --- |"]
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {row['what']} | skipped: {row['skipped']} | |")
        else:
            lines.append(
                f"| {row['what']} | {row['seconds']:.1f} | {int(str(row['peak_rss_bytes'])) / 2**20:.0f} |"
            )
    return "\n".join(lines)
