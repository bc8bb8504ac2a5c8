"""The processes of a run with ranks: launcher, torchrun, ranks and their helpers; how one is chosen, signalled, and none left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import psutil

_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_libc = ctypes.CDLL(None, use_errno=True)
Answer = TypeVar("Answer")


class NotReached(Exception):
    """The run did not come to the moment at which it was to be disturbed."""


def end_with(parent: int) -> None:
    """Called in a new process: has the system kill it when `parent` ends, however that does; what a killed campaign started ends with it."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it ended before that was asked
        os._exit(1)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        launcher = psutil.Process(process.pid)
        return [launcher, *launcher.children(recursive=True)]
    except (psutil.Error, OSError):
        return []


def chosen(whom: str, everyone: list[psutil.Process]) -> list[psutil.Process]:
    """Those of a run's processes that are meant."""

    def says(one: psutil.Process, word: str) -> bool:
        return word in " ".join(_asked(one, one.cmdline, []))

    if whom == "all":
        return everyone
    if whom == "launcher":
        return everyone[:1]
    torchruns = [one for one in everyone if says(one, "torch.distributed.run")]
    if whom == "torchrun":
        return torchruns
    launchers = {one.pid for one in torchruns}
    ranks = [
        one
        for one in everyone
        if _asked(one, one.environ, {}).get("RANK") == whom.removeprefix("rank ")
        and says(one, "asft_nemo.ranks")
        and _asked(one, one.ppid, None) in launchers
    ]
    if not ranks:
        raise NotReached(f"there is no {whom}")
    return ranks


def _asked(one: psutil.Process, question: Callable[[], Answer], ended: Answer) -> Answer:
    """What a process says of itself; `ended` where it ends meanwhile, as helpers of a run do at any moment."""
    try:
        return question() if one.is_running() else ended
    except (psutil.Error, OSError):  # one that is just ending may also refuse to be read
        return ended


def send(one: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.Error):
        one.send_signal(number)


def wait_for_end(everyone: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run after so long; zombies have ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        left = [one for one in everyone if _runs(one)]
        if not left:
            return []
        time.sleep(0.1)
    return left


def _runs(one: psutil.Process) -> bool:
    try:
        return one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_all(process: subprocess.Popen[bytes], others: Sequence[psutil.Process] = ()) -> None:
    """Leaves nothing of a start behind, whatever became of it."""
    for one in reversed([*family(process), *others]):
        send(one, signal.SIGKILL)
    process.wait()
