"""Imports NeMo once and forks ranks off itself; each rank waits for job files, runs them, and writes what they return as JSON.

`python rank_worker.py` reads orders from its standard input, a line of JSON each: the folder of a group, and for every rank what its
environment has beside that of this process. The ranks' process ids go into the folder's file `ranks`. It ends with its standard input.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

import psutil

POLL_SECONDS = 0.02
WATCH_SECONDS = 1.0


def import_everything() -> None:
    """What most jobs need. Nothing may start threads of Python's or a process group: a fork takes neither along."""
    from asft_nemo.cpu import backend

    backend.install()  # before anything imports megatron
    for name in ("asft_nemo.train", "asft_nemo.nemo.build"):
        importlib.import_module(name)


def leave(code: int) -> NoReturn:
    """Ends this rank at once, and the helpers of checkpoint writing, which nothing else ends."""
    for helper in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may end by itself meanwhile
            helper.kill()
    os._exit(code)


def end_with_the_tests() -> None:
    """Ends this rank, also amid a collective, when what it was forked from has gone, as it does with the process of the tests."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    leave(1)


def work(folder: Path) -> None:
    """Does one job after the other until the group is told to stop."""
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


def forked(folder: Path, environment: dict[str, str]) -> int:
    """Starts a rank; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.update(environment)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for here, there in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(here, there)
        know_the_rank(int(environment["RANK"]))
        threading.Thread(target=end_with_the_tests, daemon=True).start()
        work(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    leave(code)


def know_the_rank(rank: int) -> None:
    """Lightning asked for it when it was imported."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    rank_zero_only.rank = rank  # type: ignore[attr-defined]


def main() -> None:
    import_everything()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ranks that end are gone, without anybody waiting for them
    while line := sys.stdin.readline():
        order = json.loads(line)
        folder = Path(order["folder"])
        pids = [forked(folder, environment) for environment in order["ranks"]]
        partial = folder / ".ranks"
        partial.write_text(json.dumps(pids))
        partial.replace(folder / "ranks")


if __name__ == "__main__":
    main()
