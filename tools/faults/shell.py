"""Runs `asft` commands as a user would, in a process of their own that starts at once: a fork of this one, which has imported what they need.

A command's words go through `asft_nemo.cli.main`, so exit code, output and tracebacks are those of the `asft` command.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from faults.processes import end_with

LIMIT = 120.0  # seconds for one command without ranks
Job = Sequence[str] | Callable[[], int]


@dataclass(frozen=True)
class Said:
    """What a command left.

    Attributes:
        code: its exit code; None where it did not end in time.
        out, err: what it wrote.
        seconds: it took.
    """

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def sentences(self) -> list[str]:
        """What it says to the user about an error; of a comparison that failed the last line of its answer."""
        found = [line.removeprefix("asft: ") for line in self.err.splitlines() if line.startswith("asft: ")]
        return found or self.out.splitlines()[-1:]


def run(
    job: Job,
    *,
    cwd: Path,
    seconds: float,
    bound: bool = False,
    largest_file: int | None = None,
) -> Said:
    """Runs a command, or a function that returns an exit code.

    Args:
        job: words behind `asft`, or the function.
        cwd: where.
        seconds: after which it counts as hanging, and is killed with all it started.
        bound: by modes, which root is not.
        largest_file: bytes; writing more into one file fails.
    """
    return Running(job, cwd=cwd, bound=bound, largest_file=largest_file).wait(seconds)


class Running:
    """A command that has been started; arguments as `run`."""

    def __init__(self, job: Job, *, cwd: Path, bound: bool = False, largest_file: int | None = None):
        self._started = time.monotonic()
        self._out, self._err = (_scratch(), _scratch())
        self._status: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        campaign = os.getpid()
        # Until it is the command, a signal to it would find the campaign's handler, which clears away what the campaign has made.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            self.pid = os.fork()
            if self.pid == 0:
                end_with(campaign)
                _be_command(job, (self._out.fileno(), self._err.fileno()), cwd, bound, largest_file)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def alive(self) -> bool:
        """Whether it still runs."""
        if self._status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if ended else None
        return self._status is None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to it and to all that it started."""
        if self.alive():
            _signal_group(self.pid, number)

    def wait(self, seconds: float) -> Said:
        """What it left; after so many seconds, counted from now, it counts as hanging and is killed with all it started."""
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        hangs = self.alive()
        _signal_group(self.pid, signal.SIGKILL)  # what it left behind, too
        if hangs:
            self._status = os.waitpid(self.pid, 0)[1]
        assert self._status is not None
        texts = []
        for stream in (self._out, self._err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
            stream.close()
        code = None if hangs else os.waitstatus_to_exitcode(self._status)
        return Said(code, texts[0], texts[1], time.monotonic() - self._started)


def _signal_group(child: int, number: signal.Signals) -> None:
    """The child makes a group of its own as the first it does; a moment before that it is alone."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            send(child, number)
            return


def _be_command(job: Job, streams: tuple[int, int], cwd: Path, bound: bool, largest_file: int | None) -> None:
    """Never returns."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(streams[0], 1)
        os.dup2(streams[1], 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.chdir(cwd)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        if bound:
            _obey_modes()
        code = perform(job)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _obey_modes() -> None:
    """Gives up root's right to read and write whatever modes say (capabilities 1 and 2 of Linux); nothing for another user.

    Raises:
        OSError: the system refuses.
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; low and high
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for place in range(3):
        sets[place] &= ~0b110
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def perform(job: Job) -> int:
    """Does a job in this process; returns its exit code."""
    if callable(job):
        return job()
    from asft_nemo import cli

    return cli.main(list(job))


def _scratch() -> IO[bytes]:
    """A file without a name, which goes when it is closed."""
    return os.fdopen(os.memfd_create("said"), "w+b")
