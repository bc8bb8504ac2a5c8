"""What torchrun starts on every rank: `python -m asft_nemo.ranks JOBS.json` does each job of the file, one after another."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from asft_nemo.leaving import USER_ERROR_EXIT, give_up, leave

__all__ = ["USER_ERROR_EXIT", "leave", "main"]

TERMINATED_EXIT = 143  # what a shell reports for SIGTERM
WATCH_SECONDS = 1.0


def main(argv: list[str]) -> int:
    """Does the jobs; a `UserError` goes to the file named by ``ASFT_ERROR_FILE`` for the launcher to say once."""
    from asft_nemo.config.schema import from_dict
    from asft_nemo.errors import UserError, full_gpu, mendable
    from asft_nemo.logs import set_up_logging
    from asft_nemo.train import cache_reference, train, write_logits

    does: dict[str, Callable[..., None]] = {
        "train": train,
        "cache": functools.partial(cache_reference, repair=False),
        "repair": functools.partial(cache_reference, repair=True),
        "logits": write_logits,
    }
    signal.signal(signal.SIGTERM, lambda *_: leave(TERMINATED_EXIT))
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    set_up_logging(rank=int(os.environ.get("RANK", "0")))
    if os.environ.get("ASFT_ERROR_FILE"):
        logging.getLogger("asft_nemo.data").setLevel(logging.ERROR)  # the launcher has said it
    for job in json.loads(Path(argv[0]).read_text()):
        files = {name: Path(path) for name, path in job.get("files", {}).items()}
        try:
            does[job["job"]](from_dict(job["config"]), **files)
        except UserError as error:
            give_up(error)
        except Exception as error:
            if isinstance(error, OSError) and (told := mendable(error)) is not None:
                give_up(told)
            logging.getLogger(__name__).error(
                "rank %s failed:\n%s", os.environ.get("RANK", "0"), traceback.format_exc()
            )
            if (told := full_gpu(error, job=job["job"])) is not None:
                give_up(told)
            leave(1)
    return 0


def _end_with_launcher() -> None:
    """Ends this rank when torchrun or the launcher has gone: torchrun gives ranks a session of their own, so a SIGKILL to the launcher
    would leave them training, and writing, into a folder that somebody resumes.
    """
    parent = os.getppid()
    launcher = int(os.environ.get("ASFT_LAUNCHER_PID", "0"))
    while os.getppid() == parent and _alive(launcher):
        time.sleep(WATCH_SECONDS)
    leave(1)


def _alive(pid: int) -> bool:
    """Whether process `pid` runs (a zombie does not); 0 stands for no launcher. Linux's /proc."""
    if pid == 0:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
