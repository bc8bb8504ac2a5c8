"""NeMo's own importer and exporter beside ours, where Transformer Engine, whose names they depend on, is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_NEMO = """
import sys
from nemo.collections import llm
hf, nemo, back = sys.argv[2:]
if sys.argv[1] == "import":
    llm.import_ckpt(model=llm.Qwen2Model(llm.Qwen2Config500M()), source=f"hf://{hf}", output_path=nemo)
else:
    llm.export_ckpt(path=nemo, target="hf", output_path=back)
"""


OURS = ("asft import", "asft export")


def measure(hf_dir: Path, scratch: Path, *, seconds: float) -> list[dict[str, Any]]:
    """Seconds and peak resident bytes of both directions, each in a process of its own; a reason where one did not run.

    Args:
        hf_dir: a Qwen2 checkpoint with tokenizer files.
        scratch: an empty folder.
        seconds: after which each is ended.
    """
    ours, nemo = (
        [str(scratch / name) for name in ("ours", "ours_hf")],
        [str(scratch / name) for name in ("nemo", "nemo_hf")],
    )
    asft = [sys.executable, "-m", "asft_nemo"]
    rows = [
        row_of(OURS[0], [*asft, "import", str(hf_dir), ours[0]], seconds=seconds),
        row_of(OURS[1], [*asft, "export", *ours], seconds=seconds),
    ]
    for direction in ("import", "export"):
        title = f"NeMo {direction}_ckpt"
        if importlib.util.find_spec("transformer_engine") is None:
            rows.append({"what": title, "skipped": "Transformer Engine is not installed"})
        else:
            command = [sys.executable, "-c", _NEMO, direction, str(hf_dir), *nemo]
            rows.append(row_of(title, command, seconds=seconds))
    return rows


def row_of(title: str, command: list[str], *, seconds: float) -> dict[str, Any]:
    """One of them; it is ended with all that it started where it takes longer."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    late = threading.Event()

    def end() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    clock = threading.Timer(seconds, end)
    clock.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        end()
        raise
    finally:
        clock.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    if late.is_set():
        return {"what": title, "skipped": f"not done in {seconds:.0f} s"}
    if process.returncode:
        return {"what": title, "skipped": f"ended with exit code {process.returncode}"}
    return {"what": title, "seconds": time.perf_counter() - started, "peak_rss_bytes": usage.ru_maxrss * 1024}


def bars(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How many of ours did not end well; NeMo's say nothing of us."""
    failed = [row for row in rows if row["what"] in OURS and "skipped" in row]
    return {"failed": {"measured": len(failed), "limit": 0}}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| | seconds | peak RSS, MiB |", "| --- | --- | --- |"]
    for row in rows:
        if "skipped" in row:
            word = "failed" if row["what"] in OURS else "skipped"
            lines.append(f"| {row['what']} | {word}: {row['skipped']} | |")
        else:
            lines.append(f"| {row['what']} | {row['seconds']:.1f} | {row['peak_rss_bytes'] / 2**20:.0f} |")
    return "\n".join(lines)
