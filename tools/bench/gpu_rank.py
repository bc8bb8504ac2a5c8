"""A rank of `bench.gpu_ranks`: waits for job files, runs them, and writes what they return as JSON. `python gpu_rank.py FOLDER`"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

POLL_SECONDS = 0.02
WATCH_SECONDS = 1.0
STACK_SECONDS = 0.5  # before the parent gives up

_marks: dict[str, Any] = {"count": 0}


def at(label: str) -> None:
    """Notes what this rank is about to do, so that a hang can be told; nothing outside `bench.gpu_ranks`'s ranks."""
    folder = os.environ.get("ASFT_GPU_CHECK_FOLDER")
    if folder is None:
        return
    _marks["count"] += 1
    partial = Path(folder) / f".at_{os.environ['RANK']}"
    partial.write_text(json.dumps({"count": _marks["count"], "label": label}))
    partial.replace(Path(folder) / f"at_{os.environ['RANK']}")


def leave(code: int) -> NoReturn:
    """Ends this rank and its helpers at once: checkpoint writing keeps a process that would outlive it."""
    try:
        import psutil

        for helper in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it may end by itself meanwhile
                helper.kill()
    except ImportError:
        pass
    sys.stderr.flush()
    os._exit(code)


def _end_with_the_parent() -> None:
    # It may be gone by now, and `getppid` would name another.
    parent = int(os.environ["ASFT_GPU_CHECK_PARENT"])
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    leave(1)


def do(job: dict[str, Any]) -> dict[str, Any]:
    """One job's outcome: its value, or its error in one line with the traceback beside it."""
    module, _, name = job["call"].partition(":")
    try:
        return {"value": getattr(importlib.import_module(module), name)(**job["arguments"])}
    except Exception as error:
        return {"error": sentence(error), "traceback": traceback.format_exc()}


def sentence(error: BaseException) -> str:
    """An exception in one line; running out of memory in plain words."""
    lines = str(error).splitlines()
    first = lines[0] if lines else ""
    if type(error).__name__ == "OutOfMemoryError":
        return f"the GPU's memory does not hold it ({first.partition('. GPU')[0]})"
    return f"{type(error).__name__}: {first}".removesuffix(": ")


def main(folder: Path) -> None:
    """Does jobs until the folder has a file `stop`."""
    os.environ["ASFT_GPU_CHECK_FOLDER"] = str(folder)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    rank, number = os.environ["RANK"], 0
    with (folder / f"stack_{rank}").open("w") as stack:
        while not (folder / "stop").exists():
            file = folder / f"job_{number}.json"
            if not file.exists():
                time.sleep(POLL_SECONDS)
                continue
            job = json.loads(file.read_text())
            late = max(job["timeout"] - STACK_SECONDS, 0.1)
            faulthandler.dump_traceback_later(late, file=stack)
            outcome = do(job)
            faulthandler.cancel_dump_traceback_later()
            partial = folder / f".result_{number}_{rank}"
            partial.write_text(json.dumps(outcome))
            partial.replace(folder / f"result_{number}_{rank}.json")
            number += 1
    leave(0)


if __name__ == "__main__":
    # jobs mark their places in the module that they import, not in this script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from bench import gpu_rank

    gpu_rank.main(Path(sys.argv[1]))
