"""Which cache a folder holds: the identity that its rows are valid for, written once into manifest.json."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from asft_nemo.errors import CacheError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
REPAIR = "run `asft cache-reference` with --repair, which recomputes only what is lost"
_LOCK_NAME = ".manifest.lock"
_LOCK_SECONDS = 60  # making a manifest takes milliseconds
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Name in the identity -> (name in a safetensors header, torch's dtype).
DTYPES: dict[str, tuple[str, torch.dtype]] = {
    "bf16": ("BF16", torch.bfloat16),
    "fp16": ("F16", torch.float16),
    "fp32": ("F32", torch.float32),
    "fp64": ("F64", torch.float64),
}


class DamagedManifest(CacheError):
    """A manifest that is not byte for byte as it was written."""


@dataclass(frozen=True)
class CacheIdentity:
    """What the stored hidden states depend on, and nothing that they do not: no packing, no order, no layout.

    Attributes:
        base: fingerprint of the base weights.
        tokenizer: fingerprint of the tokenizer.
        template: name or fingerprint of what turns a record into text and decides which tokens are learned.
        data: fingerprint of the examples that the sample ids number.
        sequence_length: tokens an unpacked example may have; token offsets are below it.
        hidden_size: numbers in a row.
        vocab_size: rows of the reference's head without padding.
        num_samples: examples of the data.
        dtype: of the stored rows, a key of `DTYPES`.
        precision: the arithmetic of the reference's forward pass, for example bf16 or fp8_current.
    """

    base: str
    tokenizer: str
    template: str
    data: str
    sequence_length: int
    hidden_size: int
    vocab_size: int
    num_samples: int
    dtype: str
    precision: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not 0 < self.sequence_length < 2**31 or self.hidden_size < 1:
            raise ValueError(f"sequence_length={self.sequence_length}, hidden_size={self.hidden_size}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Torch's dtype of the rows."""
        return DTYPES[self.dtype][1]

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's hidden state."""
        return self.hidden_size * self.torch_dtype.itemsize

    def json(self) -> str:
        """The fields as one line of JSON, always in the same order."""
        return json.dumps(asdict(self), sort_keys=True)


def differences(cache: Mapping[str, Any], identity: CacheIdentity) -> list[str]:
    """Returns one phrase per field that differs: its name, the cache's value, this run's value."""
    here = asdict(identity)
    names = [field.name for field in fields(identity)] + [name for name in cache if name not in here]
    return [
        f"{name} ({cache.get(name)!r} in the cache, {here.get(name)!r} in this run)"
        for name in names
        if cache.get(name) != here.get(name)
    ]


def open_or_create(directory: str | Path, identity: CacheIdentity, *, written_by: Mapping[str, Any]) -> Path:
    """Makes the folder a cache of this identity, or checks that it is one. Any number of processes may call it at once.

    Args:
        directory: `reference.cache_dir`; parents are created.
        identity: what the rows will depend on.
        written_by: what a reader may want to know of the writing job (layout, versions); plain values, never compared.

    Returns:
        The folder.

    Raises:
        CacheError: the folder holds another cache or something else, its manifest is damaged, or it cannot be written.
    """
    directory = Path(directory)
    with disk_errors(directory):
        if not (directory / MANIFEST_NAME).is_file():
            directory.mkdir(parents=True, exist_ok=True)
            with FileLock(str(directory / _LOCK_NAME), timeout=_LOCK_SECONDS):
                if not (directory / MANIFEST_NAME).is_file():
                    _refuse_foreign_folder(directory)
                    write_manifest(directory, identity, written_by=written_by)
    check_identity(directory, identity)
    return directory


def check_identity(directory: str | Path, identity: CacheIdentity) -> None:
    """Checks that the folder holds the cache of exactly this identity; changes nothing.

    Raises:
        CacheError: no cache, a damaged manifest, or fields that differ, each named with both values.
    """
    found = differences(read_manifest(directory)["identity"], identity)
    if found:
        raise CacheError(
            f"the cache in {directory} was written for another run: {'; '.join(found)}: set another"
            " reference.cache_dir, or remove this one"
        )


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Returns the manifest: `format`, `identity`, `written_by`, `crc32`.

    Raises:
        CacheError: it is missing, or of another format version.
        DamagedManifest: it is not byte for byte as it was written.
    """
    path = Path(directory) / MANIFEST_NAME
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheError(
            f"{directory} holds no cache ({MANIFEST_NAME} is missing): write it with `asft cache-reference`,"
            " or set another reference.cache_dir"
        ) from error
    except OSError as error:
        raise CacheError(
            f"{path} cannot be read ({error.strerror}): give read permission, or set another reference.cache_dir"
        ) from error
    try:
        manifest: dict[str, Any] = json.loads(raw)
        written = {key: value for key, value in manifest.items() if key != "crc32"}
        intact = _manifest_bytes(written) == raw and isinstance(manifest["identity"], dict)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
        manifest = {}
    if not intact:
        raise DamagedManifest(f"{path} is damaged or was edited: {REPAIR}")
    if manifest["format"] != FORMAT_VERSION:
        raise CacheError(
            f"the cache in {directory} has format {manifest['format']} where this version reads {FORMAT_VERSION}:"
            " set another reference.cache_dir, or remove this one"
        )
    return manifest


def write_manifest(directory: Path, identity: CacheIdentity, *, written_by: Mapping[str, Any]) -> None:
    """Writes the manifest under a temporary name, syncs it and renames it. The caller keeps other writers away."""
    partial = directory / f"{MANIFEST_NAME}.partial"
    plain = json.loads(json.dumps(dict(written_by)))  # as it will be read: lists for tuples, text for keys
    written = {"format": FORMAT_VERSION, "identity": asdict(identity), "written_by": plain}
    try:
        with partial.open("wb") as stream:
            stream.write(_manifest_bytes(written))
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(directory / MANIFEST_NAME)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(directory)


def _manifest_bytes(written: Mapping[str, Any]) -> bytes:
    """The one way these values are written down, so that a changed byte is a difference even where JSON allows it."""
    crc = zlib.crc32(json.dumps(written, sort_keys=True).encode())
    return (json.dumps({**written, "crc32": f"{crc:08x}"}, indent=2, sort_keys=True) + "\n").encode()


def _refuse_foreign_folder(directory: Path) -> None:
    for path in sorted(directory.iterdir()):
        if path.name.startswith("rows-"):
            raise CacheError(f"{directory} holds rows but {MANIFEST_NAME} is missing: {REPAIR}")
        if path.name not in (_LOCK_NAME, f"{MANIFEST_NAME}.partial"):
            raise CacheError(
                f"{directory} is not empty and holds no cache (found {path.name}): set another reference.cache_dir"
            )


def require_space(directory: str | Path, identity: CacheIdentity, *, rows: int) -> None:
    """Checks before hours of work that `rows` more rows fit on the disk; rows already stored do not count.

    Raises:
        CacheError: the disk has less room, or cannot be asked.
    """
    needed = rows * (identity.row_bytes + 4)  # with each row's checksum
    directory = Path(directory)
    with disk_errors(directory):
        free = shutil.disk_usage(directory).free
    if free < needed:
        raise CacheError(
            f"the cache in {directory} needs {needed / 1e9:.3g} GB more where {free / 1e9:.3g} GB are free: make"
            " room, or set reference.cache_dir to a larger disk"
        )


@contextmanager
def disk_errors(directory: Path) -> Generator[None, None, None]:
    """Turns what the file system refuses into one sentence with the cure."""
    try:
        yield
    except Timeout as error:
        raise CacheError(
            f"{directory / _LOCK_NAME} has been held for {_LOCK_SECONDS} s: end the process that holds it, or"
            " remove the file"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        if error.errno in _FULL:
            raise CacheError(
                f"the disk of {directory} is full ({reason}): make room and start the same command again, which"
                " goes on from the finished shards, or set reference.cache_dir to another disk"
            ) from error
        raise CacheError(
            f"the cache in {directory} cannot be written ({reason}): make the folder writable, or set another"
            " reference.cache_dir"
        ) from error


def sync_directory(directory: Path) -> None:
    """Makes renames inside the folder survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
