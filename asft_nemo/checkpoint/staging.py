"""A directory that appears complete or not at all."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asft_nemo.checkpoint.journal import JOURNAL_NAME, Journal
from asft_nemo.errors import CheckpointError

logger = logging.getLogger(__name__)


@contextmanager
def staged_directory(target: str | Path, *, needed_bytes: int) -> Generator[Path, None, None]:
    """Yields an empty temporary sibling of `target` and renames it to `target` at the end.

    The sibling is locked while it is written, so a second writer is refused, and what a killed one left
    behind is cleared. On an error the sibling is removed. Files are synced by those who write them;
    directories are synced here.

    Args:
        target: the directory to create; must not exist.
        needed_bytes: what will be written, compared with the free space first.

    Raises:
        CheckpointError: the target exists, another process is writing it, or the disk is full or read-only.
    """
    with _staged(Path(target), needed_bytes, None) as (staging, _):
        yield staging


@contextmanager
def resumable_directory(
    target: str | Path, *, needed_bytes: int, job: Mapping[str, Any]
) -> Generator[tuple[Path, Journal], None, None]:
    """Like `staged_directory`, for work that takes long: what an interrupted process finished is kept and used by the next one.

    Yields the temporary directory and its journal. Files the journal names are complete, everything else was cleared. A kill, Ctrl-C,
    an error of the operating system (a full disk) and a disk without room for the rest leave the directory for the next start of the same job; any other error removes it.

    Args:
        target, needed_bytes: see `staged_directory`.
        job: what decides the content of the files, as plain values; another job's leftovers are cleared.

    Raises:
        CheckpointError: as `staged_directory`.
    """
    with _staged(Path(target), needed_bytes, job) as (staging, journal):
        assert journal is not None
        yield staging, journal


@contextmanager
def _staged(
    target: Path, needed_bytes: int, job: Mapping[str, Any] | None
) -> Generator[tuple[Path, Journal | None], None, None]:
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists already: choose another path or remove it first")
    staging = target.parent / f".{target.name}.partial"
    kept = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(staging)
        journal: Journal | None = None
        try:
            journal = None if job is None else Journal(staging, job)
            _clear(staging, journal)
            _check_room(target, staging, needed_bytes - (journal.nbytes if journal else 0))
            yield staging, journal
            if journal is not None:
                journal.remove()
            sync_directories(staging)
            if target.exists():
                raise CheckpointError(f"{target} appeared while it was being written: choose another path")
            os.rename(staging, target)
            sync_directory(target.parent)
        except BaseException as error:
            may_go_on = isinstance(error, OSError | KeyboardInterrupt | SystemExit)
            if isinstance(error, _NoRoom) and journal is not None and journal.names:
                may_go_on = True  # there may be room later, and what is complete may have taken hours
            if job is not None and may_go_on:
                kept = f"; what is complete stays in {staging}, and the same command goes on from there"
                logger.info("interrupted%s", kept)
            else:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise CheckpointError(
            f"cannot write {target} ({error.strerror or error}{where}): make room or choose a place that can be written to{kept}"
        ) from error


class _NoRoom(CheckpointError):
    """The disk has no room for what is still to be written."""


def _check_room(target: Path, staging: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(staging).free
    if free < needed_bytes:
        raise _NoRoom(
            f"{target} needs {_shown(needed_bytes)} where {_shown(free)} are free: make room or choose another disk"
        )


def _shown(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _lock(staging: Path) -> int:
    """Returns a descriptor holding the directory's lock, which ends with the process."""
    staging.mkdir(exist_ok=True)
    if staging.is_symlink():
        raise CheckpointError(f"{staging} is a link, not a folder of ours: remove it")
    try:
        descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:  # another has locked, filled and renamed it since
        raise _busy(staging) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The directory may have been renamed to its target by its writer since it was opened.
        same = staging.is_dir() and os.path.samestat(os.fstat(descriptor), os.stat(staging))
    except BlockingIOError:
        same = False
    if not same:
        os.close(descriptor)
        raise _busy(staging)
    return descriptor


def _busy(staging: Path) -> CheckpointError:
    return CheckpointError(f"another process is writing {staging}: wait for it to end, then try again")


def _clear(staging: Path, journal: Journal | None) -> None:
    """Removes everything but the journal and the files it names."""
    kept: frozenset[str] = frozenset() if journal is None else journal.names | {JOURNAL_NAME}
    files = [path for path in staging.rglob("*") if not path.is_dir() or path.is_symlink()]
    leftovers = [path for path in files if str(path.relative_to(staging)) not in kept]
    if journal is not None and journal.names:
        logger.info("going on with %d complete files in %s", len(journal.names), staging)
    elif leftovers:
        logger.info("clearing what an interrupted conversion left in %s", staging)
    for path in leftovers:
        path.unlink()
    for path in sorted(staging.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def sync_directory(directory: Path) -> None:
    """Syncs the names in a directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directories(root: Path) -> None:
    """Syncs `root` and every directory below it, deepest first."""
    for directory, _, _ in os.walk(root, topdown=False):
        sync_directory(Path(directory))


def sync_small_files(root: Path, *, but: str) -> None:
    """Syncs every file below `root` whose name does not end with `but`, whose writers have synced those, and every directory."""
    for path in root.rglob("*"):
        if path.is_file() and path.suffix != but:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_directories(root)


def copy_contents(source: Path, target: Path) -> None:
    """Copies a folder's files without their modes: what nobody may write to at its source is ours to add to and to remove here."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            copy_contents(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a small file and syncs it."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
