"""One rank of a `RankGroup`: waits for job files, runs them, writes what they return as JSON."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import psutil

POLL_SECONDS = 0.02
WATCH_SECONDS = 1.0


def end_with_the_tests(tester: int) -> None:
    """Ends this rank, also amid a collective, when torchrun or the process of the tests has gone: torchrun gives ranks a session of
    their own, so nothing sent to torchrun's reaches them.
    """
    torchrun = os.getppid()
    while os.getppid() == torchrun and Path(f"/proc/{tester}").exists():
        time.sleep(WATCH_SECONDS)
    for helper in psutil.Process().children(recursive=True):  # of checkpoint writing; nothing else ends them
        helper.kill()
    os._exit(1)


def main(folder: Path) -> None:
    from asft_nemo.cpu import backend

    tester = int(os.environ["ASFT_TESTER_PID"])
    threading.Thread(target=end_with_the_tests, args=(tester,), daemon=True).start()
    backend.install()  # before any job imports megatron
    rank = int(os.environ["RANK"])
    number = 0
    while True:
        job_file = folder / f"job_{number}.json"
        while not job_file.exists():
            if (folder / "stop").exists():
                return
            time.sleep(POLL_SECONDS)
        job = json.loads(job_file.read_text())
        module, _, name = job["call"].partition(":")
        try:
            outcome = {"value": getattr(importlib.import_module(module), name)(**job["arguments"])}
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        partial = folder / f".result_{number}_{rank}"
        partial.write_text(json.dumps(outcome))
        partial.replace(folder / f"result_{number}_{rank}.json")
        number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
