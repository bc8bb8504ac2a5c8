"""The signal to stop: SIGUSR1 ahead of a time limit, SIGTERM ahead of a preemption; heard by a thread, acted on between steps.

Slurm signals every process of a step, also those that a rank started. Both signals are therefore blocked, which children inherit and so
survive, and taken by a thread that waits for them; a handler would be lost in children that start a program of their own. There is a handler
all the same, for a library that unblocks a signal behind our back: it hands the signal on to that thread and does nothing else, since it may
interrupt the main thread anywhere, also where that holds a lock which acting on the signal would take.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_heard = threading.Event()
_listening = threading.Event()


class Stopped(Exception):
    """Training stopped as asked, behind the complete checkpoint of the step it names."""


def listen(*, at_once: Callable[[], None] | None = None) -> None:
    """Begins to listen. Called in the main thread, before it starts threads or processes.

    Args:
        at_once: called by the listening thread when a signal comes, by work that may be ended anywhere; None = the work asks `heard`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # It starts with the first helper process, of a checkpoint, and leaves SIGTERM unblocked in the thread that started it: it starts here.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # The thread inherits the mask: it is there, and waits, whatever the main thread's mask becomes.
    listener = threading.Thread(target=_wait, args=(at_once,), name="stop-signal", daemon=True)
    listener.start()
    for number in SIGNALS:  # a shell may have left SIGUSR1 ignored
        signal.signal(number, lambda number, _: _hand_on(number, listener))
    _listening.set()


def _hand_on(number: int, listener: threading.Thread) -> None:
    """The handler. It waits for no lock and logs nothing; a forked child has no listener, and nobody asks it to stop."""
    if listener.ident is not None and listener.is_alive():
        signal.pthread_kill(listener.ident, number)


def _wait(at_once: Callable[[], None] | None) -> None:
    while True:
        number = signal.sigwait(SIGNALS)
        if at_once is not None:
            at_once()
        if not _heard.is_set():
            logger.info("%s: training stops behind the step it is in", signal.Signals(number).name)
        _heard.set()


def listening() -> bool:
    """Whether this process listens; the same on all ranks of a job."""
    return _listening.is_set()


def heard(*, within: float = 0.0) -> bool:
    """Whether this process was asked to stop, or is within so many seconds; ranks of one job hear it at different times, and some may not."""
    return _heard.wait(within)


def say_stopped(where: str) -> None:
    """Leaves word for the batch script that the job stopped, and may go on, behind what `where` names."""
    name = os.environ.get("ASFT_STOP_FILE")
    if name is not None:
        Path(name).write_text(f"{where}\n")
