"""The demo's folder: whose it is, who may write in it, and that a report in it is always whole.

data/         training files, tests, held-out text
base/         the base model as a NeMo checkpoint
runs/         one run folder a training run, as `asft train` leaves it
models/       the exported Hugging Face models, the round-tripped base among them
evaluation/   results.json and samples.jsonl of every model
report.html, report.json
demo.json     marks the folder as a demo's
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from asft_nemo.errors import UserError

logger = logging.getLogger(__name__)

MARKER = "demo.json"
FORMAT = "asft demo 1"
PARTS = ("report.html", "report.json", "data", "base", "runs", "models", "evaluation")


@contextmanager
def opened(out_dir: Path, *, needed_bytes: int) -> Iterator[Path]:
    """An empty demo folder that belongs to this process until the end of the block.

    A former demo's parts are removed, the report first; anything else in the folder stays.

    Args:
        out_dir: created where missing.
        needed_bytes: what the demo will write.

    Raises:
        UserError: the folder is not a demo's, is in use by another demo, cannot be written, or the disk is too full.
    """
    out_dir = out_dir.absolute()
    check_ours(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(out_dir / ".demo.lock"))
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another demo is running in {out_dir}: wait for it, or choose another folder with --out"
        ) from None
    except OSError as error:
        raise UserError(
            f"cannot write into {out_dir} ({error.strerror}): choose another folder with --out"
        ) from error
    with lock:
        if (out_dir / MARKER).exists():
            logger.info("replacing the former demo in %s", out_dir)
        _write(out_dir / MARKER, json.dumps({"format": FORMAT}) + "\n")
        for name in PARTS:
            _remove(out_dir / name)
        free = shutil.disk_usage(out_dir).free
        if free < needed_bytes:
            raise UserError(
                f"the demo writes about {needed_bytes / 1e6:.0f} MB and {out_dir} has {free / 1e6:.0f} MB left: "
                "make room, or choose another folder with --out"
            )
        yield out_dir


def check_ours(out_dir: Path) -> None:
    """Refuses a folder with content that no demo made.

    Raises:
        UserError: `out_dir` is a file, or holds something and is not marked as a demo's.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file: choose a folder with --out")
    if not out_dir.is_dir() or _marked(out_dir / MARKER):
        return
    if any(entry.name != ".demo.lock" for entry in out_dir.iterdir()):
        raise UserError(
            f"{out_dir} is not empty and holds no demo, so nothing in it is replaced: choose another folder with --out"
        )


def _marked(marker: Path) -> bool:
    try:
        return json.loads(marker.read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_report(out_dir: Path, *, page: str, values: Mapping[str, Any]) -> Path:
    """Writes report.json, then report.html, each complete or not at all; returns the page's path."""
    _write(out_dir / "report.json", json.dumps(values, indent=2, allow_nan=False) + "\n")
    _write(out_dir / "report.html", page)
    return out_dir / "report.html"


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
