"""What the ranks do where a test lets one of them hang. Every function is called on all ranks with JSON arguments."""

from __future__ import annotations

import importlib
import os
import signal
import time
from typing import Any

SIGN_SECONDS = 5.0  # much longer than the two between two signs of a watch that waits for ten


def stop_at(where: str, *, rank: int, job: str, arguments: dict[str, Any]) -> None:
    """Does a job in which one rank's process is stopped, for good, as it comes to a function or class.

    Args:
        where: ``module:name``, as the job's code calls it.
        rank: which rank.
        job: what is called, ``module:function``.
        arguments: its arguments.
    """
    module, _, name = where.partition(":")
    holder = importlib.import_module(module)
    original = getattr(holder, name)

    def stopped(*given: Any, **named: Any) -> Any:
        if os.environ["RANK"] == str(rank):
            time.sleep(SIGN_SECONDS)  # its last sign tells of this place
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(*given, **named)

    setattr(holder, name, stopped)
    module, _, name = job.partition(":")
    getattr(importlib.import_module(module), name)(**arguments)
