"""`asft data prepare`: files to a prepared directory (`asft_nemo.data.store`), as much of it as is not there yet.

A part's name is a SHA-256 over everything that decides its bytes, so a part that is there is right and is used again: after another file
has changed, after a run that ended in between, after one that was refused for its bad rows. What a killed run has left of a part lies in
`unfinished/<key>` and is gone on with. The manifest comes last; until then the directory is what it was.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import asft_nemo
from asft_nemo.config.schema import DataConfig
from asft_nemo.data.contamination import EvaluationIndex
from asft_nemo.data.digests import digest
from asft_nemo.data.files import expand, unreadable
from asft_nemo.data.manifest import VERSION, Manifest, Source, read_manifest, settings_of, tokenizer_of
from asft_nemo.data.sources import BadRow, refuse_bad_rows
from asft_nemo.data.store import BAD_ROWS, PARTS, Counts, Part, PartWriter, is_prepared
from asft_nemo.data.tokenization import TextTokenizer
from asft_nemo.data.workers import Setup, Task, processes, tasks
from asft_nemo.errors import DataError

_UNFINISHED = "unfinished"
_LOCK = ".lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_SETTLED_NS = 2_000_000_000  # a file that changes again within a file system's tick keeps its time

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Suites:
    """Evaluation suites whose questions are taken out.

    Attributes:
        names: as they were given.
        index: of their questions.
        sha256: over their questions.
    """

    names: tuple[str, ...]
    index: EvaluationIndex
    sha256: str


@dataclass(frozen=True)
class Result:
    """What a call has done.

    Attributes:
        manifest: of the directory as it is now.
        made: parts that were tokenised, wholly or from where a killed run had come to.
        used_again: sources whose parts were there.
        unchanged: nothing was to do.
    """

    manifest: Manifest
    made: int
    used_again: int
    unchanged: bool


def prepare_files(
    entries: Sequence[str | Path],
    data: DataConfig,
    *,
    tokenizer_dir: str | Path,
    out: Path,
    workers: int,
    suites: Suites | None,
    progress: Progress,
) -> Result:
    """Tokenises files into a prepared directory.

    Args:
        entries: files, patterns or directories.
        data: fields, template, what is learned, and what becomes of bad rows; nothing else is looked at.
        tokenizer_dir: Hugging Face directory with the tokenizer.
        out: the directory; made where it is missing.
        workers: tokenising processes; 1 = in this one.
        suites: rows that hold one of their questions are left out; None = none are.
        progress: called with bytes done, bytes in all, and the file's name.

    Raises:
        DataError: a file cannot be read, rows are bad (as `data.on_bad_row` says), no row is left, or `out` is in use, holds something
            else or cannot be written.
    """
    _refuse_foreign(out)
    paths = [path for entry in entries for path in expand(entry)]
    try:
        with _locked(out) as lock:
            before = _manifest_before(out)
            draft = _draft(paths, data, tokenizer_dir, suites, before)
            missing = _missing(draft, out)
            if missing:
                setup = Setup(
                    data, TextTokenizer.load(tokenizer_dir), None if suites is None else suites.index
                )
                with processes(workers, setup, close=lock) as run:
                    _make(run, missing, data, out, progress)
            manifest = _counted(draft, out)
            _refuse(manifest, data, out)
            unchanged = before is not None and _timeless(before) == _timeless(manifest)
            if manifest != before:
                manifest.write(out)
            _remove_unused(manifest, out)
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror or error}): free space there or give another --out"
        ) from error
    return Result(manifest, made=len(missing), used_again=len(paths) - len(missing), unchanged=unchanged)


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file: give a directory")
    if out.is_dir() and not (out / _LOCK).exists() and any(out.iterdir()):
        raise DataError(f"--out {out} holds something else: give an empty or a new directory")


@contextmanager
def _locked(out: Path) -> Iterator[int]:
    """Keeps others out; the lock ends with the process, however it ends."""
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another asft data prepare is writing to {out}: wait until it has ended, or give another --out"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise DataError(
                f"the file system of {out} has no locks ({error.strerror}), which keep two calls apart: give another --out"
            ) from error
        yield lock
    finally:
        os.close(lock)


def _manifest_before(out: Path) -> Manifest | None:
    """What the directory held; None where it held nothing, or nothing that this version can use."""
    try:
        return read_manifest(out) if is_prepared(out) else None
    except DataError:
        return None


def _draft(
    paths: Sequence[Path],
    data: DataConfig,
    tokenizer_dir: str | Path,
    suites: Suites | None,
    before: Manifest | None,
) -> Manifest:
    """The manifest to be, without counts."""
    known = {} if before is None else {source.name: source for source in before.sources}
    whole: dict[str, Any] = {
        "version": VERSION,
        "settings": settings_of(data),
        "tokenizer": _tokenizer(tokenizer_dir, data.template),
        "suites": None if suites is None else suites.sha256,
    }
    return Manifest(
        settings=whole["settings"],
        tokenizer=whole["tokenizer"],
        suites=None if suites is None else {"names": list(suites.names), "sha256": suites.sha256},
        sources=tuple(_source(path, whole, known.get(str(path))) for path in paths),
        made_by=asft_nemo.__version__,
    )


def _tokenizer(folder: str | Path, template: str) -> dict[str, str]:
    try:
        return tokenizer_of(folder, template)
    except OSError as error:
        raise DataError(
            f"the tokenizer in {folder} cannot be read ({error.strerror or error}): correct its permissions"
        ) from error


def _source(path: Path, whole: dict[str, Any], before: Source | None) -> Source:
    try:
        state, now = path.stat(), time.time_ns()
        source = Source(str(path), state.st_size, state.st_mtime_ns, state.st_ino, now, "", "", Counts())
        if before is not None and _same_file(source, before):
            source = replace(source, sha256=before.sha256, digested_ns=before.digested_ns)
        else:
            source = replace(source, sha256=digest(path).hex())
    except OSError as error:
        raise unreadable(path, error) from error
    # Arrow's stream format is told by the name alone.
    decides = {**whole, "source": source.sha256, "arrow": path.suffix == ".arrow"}
    return replace(source, part=hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest())


def _same_file(now: Source, before: Source) -> bool:
    """Whether the digest taken before still holds; what was younger than the clock's tick then might have changed since."""
    same = (now.bytes, now.modified_ns, now.inode) == (before.bytes, before.modified_ns, before.inode)
    return same and before.modified_ns < before.digested_ns - _SETTLED_NS


def _missing(draft: Manifest, out: Path) -> list[Source]:
    """Sources without a part, each content once."""
    by_part = {source.part: source for source in reversed(draft.sources)}
    return [
        source
        for source in draft.sources
        if by_part[source.part] is source and not _is_there(out / PARTS / source.part)
    ]


def _is_there(folder: Path) -> bool:
    """Whether a part is there, whole; what has been damaged since is removed."""
    if not folder.exists():
        return False
    try:
        Part(folder).check()
    except DataError:
        shutil.rmtree(folder)
        return False
    return True


def _make(
    run: Callable[[Iterator[tuple[Any, Task | None]]], Iterator[tuple[Any, Task | None, Any]]],
    missing: Sequence[Source],
    data: DataConfig,
    out: Path,
    progress: Progress,
) -> None:
    """Tokenises sources, one behind the other; the processes begin a file while the last rows of the one before are under way."""
    (out / PARTS).mkdir(exist_ok=True)
    total, before, within = sum(source.bytes for source in missing), 0, 0

    def jobs() -> Iterator[tuple[tuple[Source, PartWriter], Task | None]]:
        for source in missing:
            making = source, PartWriter(out / _UNFINISHED / source.part, source=_state(source))
            for task in tasks(Path(source.name), data.fields, skip_rows=making[1].counts.rows):
                yield making, task
            yield making, None

    for (source, writer), task, chunk in run(jobs()):
        if task is not None:
            writer.append(chunk)
            # Of a compressed file these are bytes in memory, so that it can seem done before it is.
            within = min(source.bytes, within + task.nbytes)
        else:
            _refuse_changed(source, writer)
            writer.finish(out / PARTS / source.part)
            before, within = before + source.bytes, 0
        progress(before + within, total, Path(source.name).name)


def _state(source: Source) -> tuple[int, ...]:
    """What shows that a file has been written to or replaced, even where its time was set back."""
    try:
        state = Path(source.name).stat()
    except OSError as error:
        raise unreadable(source.name, error) from error
    return state.st_size, state.st_mtime_ns, state.st_ino, state.st_ctime_ns


def _refuse_changed(source: Source, writer: PartWriter) -> None:
    # Without the time of the last change of state, which a new name or other permissions set, too.
    if _state(source)[:3] != (source.bytes, source.modified_ns, source.inode):
        writer.discard()  # the next run could find the first bytes again, and its rows are others
        raise DataError(f"data file {source.name} has changed while it was read: run the command again")


def _counted(draft: Manifest, out: Path) -> Manifest:
    counts = {source.part: Part(out / PARTS / source.part).counts for source in draft.sources}
    return replace(
        draft, sources=tuple(replace(source, counts=counts[source.part]) for source in draft.sources)
    )


def _refuse(manifest: Manifest, data: DataConfig, out: Path) -> None:
    """Refuses bad rows as the settings say, and a directory without an example."""
    bad = [
        BadRow(source.name, line, reason)
        for source in manifest.sources
        if source.counts.bad
        for _, line, reason in Part(out / PARTS / source.part).left_out(BAD_ROWS)
    ]
    refuse_bad_rows(bad, data)
    total = manifest.total()
    if not total.examples:
        first = f": the first is {bad[0]}" if bad else ""
        raise DataError(
            f"no row is left of {total.rows}: {total.bad} are bad and {total.contaminated} hold an evaluation question{first}"
        )


def _timeless(manifest: Manifest) -> Manifest:
    """Without what a touched file changes."""
    return replace(
        manifest,
        sources=tuple(replace(source, modified_ns=0, inode=0, digested_ns=0) for source in manifest.sources),
    )


def _remove_unused(manifest: Manifest, out: Path) -> None:
    """Removes parts that the manifest does not name, and what killed runs have left."""
    used = {source.part for source in manifest.sources}
    for folder in (out / PARTS).iterdir():
        if folder.name not in used:
            shutil.rmtree(folder)
    if (out / _UNFINISHED).exists():
        shutil.rmtree(out / _UNFINISHED)
