"""How a rank ends before its work is done: it says why, and goes at once."""

from __future__ import annotations

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
    if target is None:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  started by hand, nobody else will say it
        return
    partial = Path(f"{target}.{os.getpid()}")
    partial.write_text(json.dumps({"message": str(error)}))
    partial.replace(target)


def leave(code: int) -> NoReturn:
    """Ends this rank and its helper processes at once: other ranks may wait in a collective for it, and torchrun ends them when one has gone."""
    for child in psutil.Process().children(recursive=True):
        child.kill()  # megatron's checkpoint writer keeps a helper process that would outlive us
    sys.stderr.flush()
    os._exit(code)


def give_up(error: Exception) -> NoReturn:
    """Says what a user can mend, from whichever thread, and ends this rank."""
    report(error)
    leave(USER_ERROR_EXIT)
