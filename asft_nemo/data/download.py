"""Fetches published sets: resumed, checked, and put in place whole or not at all.

A file grows as `NAME.part` (files of the hub: in `.hub`, where huggingface_hub resumes them), is checked, and is then renamed. What was downloaded is
written to `downloads.json`: where a set states no digest, that of the first download, or of the file that
was there before it, counts from then on.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asft_nemo.data.files import rows
from asft_nemo.data.hub import innermost, quiet_hub, reach_hub
from asft_nemo.data.published import SETS, Hub, Lines, PublishedFile, PublishedSet
from asft_nemo.errors import DataError

log = logging.getLogger(__name__)

RECORD = "downloads.json"
_HUB = ".hub"
_BLOCK = 1 << 20
_TRIES = 5  # in a row without a new byte
_SECONDS = 30  # without an answer

Progress = Callable[[int, int, str], None]  # bytes here, bytes in all, name


@dataclass(frozen=True)
class Fetched:
    """A file that is in place.

    Attributes:
        path: where.
        size: in bytes.
        sha256: of its bytes.
        known: whether the set states this digest; False = it was seen at the first download.
        fresh: whether it was fetched now.
    """

    path: Path
    size: int
    sha256: str
    known: bool
    fresh: bool


class _Broken(Exception):
    """The transfer ended early; what is there can be resumed."""


def chosen(names: Sequence[str]) -> dict[str, PublishedSet]:
    """The sets of these names.

    Raises:
        DataError: one is not known.
    """
    for name in names:
        if name not in SETS:
            close = difflib.get_close_matches(name, SETS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(SETS)}"
            raise DataError(f"there is no published set {name}: {hint}")
    return {name: SETS[name] for name in names}


def download(files: Sequence[PublishedFile], out: Path, *, progress: Progress) -> list[Fetched]:
    """Puts files below `out`; those that are there and right are left alone.

    Raises:
        DataError: a server cannot be reached or does not have a file, a file is not the one that was published, or the folder cannot be
            written.
    """
    from filelock import FileLock, Timeout

    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".download.lock", timeout=0):
            fetched: list[Fetched] = []
            for file in files:
                fetched.append(_in_place(file, out, progress))
                if file.lines is not None:
                    _write_lines(fetched[-1].path, out / file.lines.name, file.lines)
            shutil.rmtree(out / _HUB, ignore_errors=True)  # what huggingface_hub keeps beside its files
            return fetched
    except Timeout as error:
        raise DataError(f"another download into {out} is under way: wait for it") from error
    except OSError as error:
        raise _unwritable(error, out) from error


def _in_place(file: PublishedFile, out: Path, progress: Progress) -> Fetched:
    record = _record(out)
    seen = record.get(file.name, {}).get("sha256")
    expected = file.sha256 or seen
    path = out / file.name
    if path.is_file():
        found = _digest(path)
        size = path.stat().st_size
        if expected is None:  # put there by hand: from now on it counts as a first download does
            _write_record(out, {**record, file.name: _entry(file, found, size)})
        if expected in (None, found):
            return Fetched(path, size, found, file.sha256 is not None, fresh=False)
        which = "published file" if file.sha256 else "file that was there first"
        raise DataError(f"{path} is not the {which} (SHA-256 {found}): move it away and download again")
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_full_disk(file, out)
    part = _from_hub(file, out) if isinstance(file.source, Hub) else _from_web(file, path, progress)
    found = _digest(part)
    if expected is not None and found != expected:
        part.unlink()
        whose = "published" if file.sha256 else "first downloaded"
        raise DataError(
            f"{file.source} is not the {whose} file (SHA-256 {found}, not {expected}): nothing was kept; try again, and if it stays so the "
            "publisher has changed it"
        )
    size = part.stat().st_size
    os.replace(part, path)
    _write_record(out, {**record, file.name: _entry(file, found, size)})
    return Fetched(path, size, found, file.sha256 is not None, fresh=True)


def _write_lines(source: Path, path: Path, lines: Lines) -> None:
    """Writes a Parquet file's rows as JSON Lines, whole or not at all; a file that is there stays."""
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as stream:
        for _, row in rows(source):
            if isinstance(row, dict) and (not lines.subjects or row["subject"] in lines.subjects):
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(part, path)


def _from_hub(file: PublishedFile, out: Path) -> Path:
    """Through huggingface_hub, which resumes, retries and knows the user's token and HF_HUB_OFFLINE."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    assert isinstance(file.source, Hub)
    source = file.source
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    try:
        with quiet_hub():
            reach_hub(endpoint)
            found = hf_hub_download(
                source.repo,
                source.path,
                repo_type="dataset",
                revision=source.revision,
                local_dir=out / _HUB / source.repo,
                endpoint=endpoint,
            )
    except LocalEntryNotFoundError as error:  # before its base class below
        raise _unreachable(file, out, "no answer") from error
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise DataError(
            f"{source} is not there, or not for everyone: look at the dataset's page, and log in (hf auth login) where it asks for that"
        ) from error
    except (HfHubHTTPError, OSError) as error:  # requests' errors are OSErrors
        raise _unreachable(file, out, innermost(error)) from error
    return Path(found)


def _from_web(file: PublishedFile, path: Path, progress: Progress) -> Path:
    """Over HTTP with ranges; a broken transfer goes on where it broke, for as long as bytes come."""
    import requests

    part = path.with_name(path.name + ".part")
    tries, wait = 0, 1.0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _transfer(file, part, progress)
            return part
        except (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
            _Broken,
        ) as error:
            got_more = part.exists() and part.stat().st_size > before
            tries, wait = (1, 1.0) if got_more else (tries + 1, wait * 2)
            if tries >= _TRIES or not (got_more or part.exists() or isinstance(error, _Broken)):
                raise _unreachable(file, path.parent, innermost(error)) from error
            log.warning("download: %s broke off (%s), going on", file.name, innermost(error))
            time.sleep(wait)
        except requests.RequestException as error:
            raise _unreachable(file, path.parent, innermost(error)) from error


def _transfer(file: PublishedFile, part: Path, progress: Progress) -> None:
    """One request: the rest of the file behind what is there, or all of it where the server gives no ranges."""
    import requests

    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    # Compressed on the way, a file would have other sizes and ranges.
    headers["Accept-Encoding"] = "identity"
    with requests.get(str(file.source), headers=headers, stream=True, timeout=_SECONDS) as answer:
        if answer.status_code == 416:  # nothing behind what is there: it is whole, or it is not of this file
            if file.size is None or have != file.size:
                part.unlink()
                raise _Broken("the part that was there does not fit, beginning anew")
            return
        if answer.status_code in (404, 410):
            raise DataError(
                f"{file.source} is not there (HTTP {answer.status_code}): it was moved or deleted"
            )
        if answer.status_code >= 500 or answer.status_code == 429:
            raise _Broken(f"HTTP {answer.status_code}")
        answer.raise_for_status()
        if answer.status_code != 206:
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None else (file.size or 0)
        try:
            with part.open("ab" if have else "wb") as stream:
                for block in answer.iter_content(_BLOCK):
                    stream.write(block)
                    have += len(block)
                    progress(have, max(total, have), file.name)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            if isinstance(error, requests.RequestException):
                raise
            raise DataError(f"{part} cannot be written ({error.strerror}): make room") from error
    if have < total:
        raise _Broken(f"{have} of {total} bytes")


def _refuse_full_disk(file: PublishedFile, out: Path) -> None:
    free = shutil.disk_usage(out).free
    if file.size is not None and free < file.size:
        raise DataError(
            f"{file.name} has {file.size >> 20} MiB, but there are only {free >> 20} MiB free in {out}: make room"
        )


def _unreachable(file: PublishedFile, out: Path, reason: str) -> DataError:
    return DataError(
        f"{file.source} cannot be reached ({reason}): go online and run the command again, which goes on where it stopped, or fetch the "
        f"file elsewhere and put it into the folder as {file.name}"
    )


def _unwritable(error: OSError, out: Path) -> DataError:
    place = error.filename or out
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return DataError(
            f"{place} is a file where a folder is needed: give another folder, or move the file away"
        )
    cure = (
        "correct the permissions or give another folder"
        if isinstance(error, PermissionError)
        else "make room"
    )
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM):
        cure = "give another folder"
    return DataError(f"{place} cannot be written ({error.strerror or error}): {cure}")


def _record(out: Path) -> dict[str, Any]:
    path = out / RECORD
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(
            f"{path} is damaged: delete it, and with it the digests of first downloads"
        ) from error


def _entry(file: PublishedFile, sha256: str, size: int) -> dict[str, Any]:
    return {"sha256": sha256, "bytes": size, "source": str(file.source)}


def _write_record(out: Path, record: dict[str, Any]) -> None:
    part = out / f"{RECORD}.part"
    part.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    os.replace(part, out / RECORD)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
