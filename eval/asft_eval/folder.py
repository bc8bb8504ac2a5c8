"""A result's folder in the hands of one process: two that write into it would lose each other's answers."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from asft_eval.errors import EvaluationError

log = logging.getLogger(__name__)

LOCK = "results.lock"

_TAKEN = (errno.EACCES, errno.EAGAIN)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_ours: set[Path] = set()
"""Folders that this process holds: the kernel's lock is between processes alone."""


@contextmanager
def held(folder: Path, *models: Path | None) -> Generator[None, None, None]:
    """The folder is this process's own within; it is made where it is missing, and taken away again where nothing came into it.

    The lock is the kernel's record lock on `results.lock`, which ends with the process whatever ended it, is not inherited by the processes that it
    starts, and reaches other machines where a network file system has locks. Where a file system has none, a warning says so. Writing the file is
    also the proof that the folder can be written: what the system says of rights is wrong for some file systems, and for root.

    Args:
        folder: of a result.
        models: directories that it must not be, because a result there would be taken for files of the model.

    Raises:
        EvaluationError: it cannot be written, is a model's directory, or another process holds it.
    """
    place = folder.resolve()
    for model in models:
        if model is not None and model.resolve() == place and (model / "config.json").is_file():
            raise EvaluationError(
                f"{folder} is the directory of the model itself, which a result would change: give another --out"
            )
    if place in _ours:
        raise EvaluationError(_in_use(folder, _who()))
    made, lock = list[Path](), None
    try:
        made = _made(place)
        lock = _locked(folder)
    except OSError as error:
        _unmade(made)
        cure = (
            "make room, or give --out a folder on another disk"
            if error.errno in _FULL
            else "give --out a folder of yours"
        )
        raise EvaluationError(f"{folder} cannot be written ({error.strerror}): {cure}") from error
    except EvaluationError:
        _unmade(made)
        raise
    _ours.add(place)
    try:
        yield
    finally:
        _ours.discard(place)
        (folder / LOCK).unlink(missing_ok=True)  # before the lock goes: who comes next makes a new file
        os.close(lock)
        _unmade(made)


def require_free(folder: Path) -> None:
    """Whether the folder can be written and nobody else writes it now.

    Raises:
        EvaluationError: see `held`.
    """
    with held(folder):
        pass


def _made(place: Path) -> list[Path]:
    """Makes the folder; returns what was not there before."""
    there = next(x for x in (place, *place.parents) if x.exists())
    if not there.is_dir():
        raise EvaluationError(f"{there} is no folder: give --out a folder of yours")
    missing = [x for x in (place, *place.parents) if not x.exists()]
    place.mkdir(parents=True, exist_ok=True)
    return missing


def _unmade(made: list[Path]) -> None:
    for folder in made:
        try:
            folder.rmdir()
        except OSError:  # something lies in it
            return


def _locked(folder: Path) -> int:
    """An open descriptor that holds the lock."""
    path = folder / LOCK
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its former holder may have removed the file between our two calls: then it is nobody's.
            if os.path.exists(path) and os.path.samestat(os.fstat(lock), os.stat(path)):
                _sign(lock, path)
                return lock
        except OSError as error:
            if error.errno in _TAKEN:
                who = os.read(lock, 1000).decode("utf-8", "replace")
                os.close(lock)
                raise EvaluationError(_in_use(folder, who or "another process")) from None
            if error.errno in _NO_LOCKS_HERE:
                log.warning(
                    "the file system of %s has no locks: start no second evaluation into that folder", folder
                )
                return lock
            os.close(lock)
            raise
        os.close(lock)


def _sign(lock: int, path: Path) -> None:
    """Says in the lock's file whose it is; the file goes where it cannot be written."""
    try:
        os.ftruncate(lock, 0)
        os.write(lock, _who().encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _who() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _in_use(folder: Path, who: str) -> str:
    return f"{folder} is being written by {who}: wait until that has ended, or give another folder"
