"""How a rank ends before its work is done: it says why, and goes at once."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

import psutil

USER_ERROR_EXIT = 2


def report(error: Exception) -> None:
    """Hands a sentence to the launcher, by the file that ``ASFT_ERROR_FILE`` names, to say once; without one it goes to stderr."""
    target = os.environ.get("ASFT_ERROR_FILE")
    if target is not None:
        partial = Path(f"{target}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a full disk: stderr is left to say it
            partial.write_text(json.dumps({"message": str(error)}))
            partial.replace(target)
            return
    print(f"error: {error}", file=sys.stderr)  # noqa: T201  there is no launcher that will say it


def leave(code: int) -> NoReturn:
    """Ends this rank and its helper processes at once: other ranks may wait in a collective for it, and torchrun ends them when one has gone."""
    try:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it may end by itself meanwhile
                child.kill()  # megatron's checkpoint writer keeps a helper process that would outlive us
        sys.stderr.flush()
    finally:
        os._exit(code)  # whatever fails: a thread that only died of it would leave the job hanging


def give_up(error: Exception) -> NoReturn:
    """Says what a user can mend, from whichever thread, and ends this rank."""
    try:
        report(error)
    finally:
        leave(USER_ERROR_EXIT)
