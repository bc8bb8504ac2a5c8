"""The prepared form of data files: tokens on disk that are mapped, not read.

A prepared directory holds `manifest.json`, which names the sources, and a part `parts/<key>/` for each source file:

    tokens.bin        int32 [tokens]       all examples, whole, one behind the other
    spans.bin         int32 [spans, 2]     runs [start, stop) of learned tokens, counted within their example
    index.bin         int64 [examples, 4]  where the example's tokens end, where its spans end, its row (from 0, blank lines not
                                           counted) and its line (from 1)
    bad_rows.txt      a JSON array a line: row, line, reason
    contaminated.txt  a JSON array a line: row, line, what was found; rows left out on purpose
    part.json         the counts, sizes and CRC-32 of the files above, and a CRC-32 of its own

Examples are not cut to a sequence length, so one form serves all of them. Numbers are little-endian. A part is renamed into place when it is
complete; `PartWriter` keeps `progress.json` beside the files of one that is not.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from asft_nemo.errors import DataError

MANIFEST, PARTS = "manifest.json", "parts"  # of a prepared directory
TOKENS, SPANS, INDEX = "tokens.bin", "spans.bin", "index.bin"
BAD_ROWS, CONTAMINATED = "bad_rows.txt", "contaminated.txt"
_FILES = (TOKENS, SPANS, INDEX, BAD_ROWS, CONTAMINATED)
_PART, _PROGRESS = "part.json", "progress.json"
_SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    TOKENS: ("<i4", (-1,)),
    SPANS: ("<i4", (-1, 2)),
    INDEX: ("<i8", (-1, 4)),
}
_SAVE_SECONDS = 5.0  # between two records of how far a part is: what a killed run loses at most

LeftOut = tuple[int, int, str]  # row, line, reason


@dataclass
class Counts:
    """What a part holds.

    Attributes:
        rows: non-blank lines of the source.
        examples, tokens, spans: that were kept.
        learned: tokens in spans.
        bad, contaminated: rows left out.
    """

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    spans: int = 0
    learned: int = 0
    bad: int = 0
    contaminated: int = 0


@dataclass
class TokenizedChunk:
    """Some consecutive rows of a source, tokenised.

    Attributes:
        rows: how many there were.
        tokens: int32 [tokens].
        spans: int32 [spans, 2].
        index: int64 [examples, 4]; token ends, span ends and rows count from this chunk's beginning, lines from the file's.
        bad, contaminated: rows left out; rows count from this chunk's beginning.
    """

    rows: int
    tokens: np.ndarray
    spans: np.ndarray
    index: np.ndarray
    bad: list[LeftOut] = field(default_factory=list)
    contaminated: list[LeftOut] = field(default_factory=list)


def is_prepared(entry: str | Path) -> bool:
    """Whether an entry of `data.train` is a directory that `asft data prepare` wrote."""
    return (Path(entry) / MANIFEST).is_file() and (Path(entry) / PARTS).is_dir()


def spans_of(learned: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of True in the masks of several examples.

    Args:
        learned: the masks, one behind the other, bool [tokens].
        starts: where each begins, int64 [examples]; none is empty.

    Returns:
        the runs [start, stop), counted within their example, int32 [runs, 2]; and how many each example has, int64 [examples].
    """
    first = np.zeros(len(learned) + 1, dtype=np.bool_)
    first[starts] = True
    first[-1] = True
    before, after = np.roll(learned, 1), np.roll(learned, -1)
    begins = np.flatnonzero(learned & (first[:-1] | ~before))
    ends = np.flatnonzero(learned & (first[1:] | ~after)) + 1
    owner = np.searchsorted(starts, begins, side="right") - 1
    runs = np.stack([begins, ends], axis=1) - starts[owner, None]
    return runs.astype(np.int32), np.bincount(owner, minlength=len(starts))


class PartWriter:
    """Appends chunks to a part that is being made, and goes on with one that a killed process has left.

    Args:
        folder: of the unfinished part; made where it is missing.
        source: the state of the file that is read; what was made while it had another one is thrown away, for its rows can be others.
    """

    def __init__(self, folder: Path, *, source: Sequence[int]):
        self._folder, self._source, self._streams = folder, list(source), dict[str, IO[bytes]]()
        folder.mkdir(parents=True, exist_ok=True)
        progress = _read_json(folder / _PROGRESS)
        if progress and progress.get("source") != self._source:
            progress = None
        self.counts = Counts(**progress["counts"]) if progress else Counts()
        sizes = progress["sizes"] if progress else dict.fromkeys(_FILES, 0)
        for name in _FILES:
            path = folder / name
            path.touch()
            if path.stat().st_size < sizes[name]:  # the disk has lost what was there: begin again
                self.counts, sizes = Counts(), dict.fromkeys(_FILES, 0)
        for name in _FILES:
            stream = (folder / name).open("r+b")
            stream.truncate(sizes[name])
            stream.seek(0, os.SEEK_END)
            self._streams[name] = stream
        self._saved = time.monotonic()

    def append(self, chunk: TokenizedChunk) -> None:
        """Adds the next rows."""
        counts, index = self.counts, chunk.index.astype("<i8")
        index[:, :3] += (counts.tokens, counts.spans, counts.rows)
        self._streams[TOKENS].write(chunk.tokens.astype("<i4").tobytes())
        self._streams[SPANS].write(chunk.spans.astype("<i4").tobytes())
        self._streams[INDEX].write(index.tobytes())
        for name, left_out in ((BAD_ROWS, chunk.bad), (CONTAMINATED, chunk.contaminated)):
            for row, line, reason in left_out:
                self._streams[name].write(json.dumps([row + counts.rows, line, reason]).encode() + b"\n")
        counts.rows += chunk.rows
        counts.examples += len(index)
        counts.tokens += len(chunk.tokens)
        counts.spans += len(chunk.spans)
        counts.learned += int((chunk.spans[:, 1] - chunk.spans[:, 0]).sum())
        counts.bad += len(chunk.bad)
        counts.contaminated += len(chunk.contaminated)
        if time.monotonic() - self._saved >= _SAVE_SECONDS:
            self._save(_PROGRESS, {"source": self._source})

    def finish(self, target: Path) -> Counts:
        """Puts the part in its place."""
        for stream in self._streams.values():
            stream.flush()
        sums = {
            name: _crc32(self._folder / name) for name in _FILES
        }  # some of it a process before this one wrote
        self._save(_PART, {"crc32": sums})
        self.close()
        target.parent.mkdir(exist_ok=True)
        self._folder.rename(target)
        (target / _PROGRESS).unlink(missing_ok=True)
        _sync(target.parent)
        return self.counts

    def discard(self) -> None:
        """Removes what there is of the part."""
        self.close()
        shutil.rmtree(self._folder)

    def close(self) -> None:
        """Closes the files; what was appended since the last record of the progress is lost."""
        for stream in self._streams.values():
            stream.close()

    def _save(self, name: str, more: dict[str, Any]) -> None:
        sizes: dict[str, int] = {}
        for file, stream in self._streams.items():
            stream.flush()
            os.fsync(stream.fileno())
            sizes[file] = stream.tell()
        write_json(self._folder / name, summed({"counts": asdict(self.counts), "sizes": sizes, **more}))
        self._saved = time.monotonic()


class Part:
    """A complete part, mapped; nothing is read before it is asked for. Pickles as its folder.

    Args:
        folder: of the part.

    Attributes:
        counts: what it holds.
        tokens, spans, index: as this module's docstring says.

    Raises:
        DataError: it is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        described = _read_json(folder / _PART)
        if described is None:
            raise DataError(f"{folder / _PART} is missing or damaged: {_AGAIN}")
        self.counts = Counts(**described["counts"])
        self._sums: dict[str, int] = described.get("crc32", {})  # none in parts of an older version
        for name, size in described["sizes"].items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                is_ = "is missing" if found is None else f"has {found} bytes where {size} were written"
                raise DataError(f"{path} {is_}: {_AGAIN}")
        self.tokens, self.spans, self.index = (_map(folder / name) for name in (TOKENS, SPANS, INDEX))

    def check(self) -> Part:
        """Reads everything once and holds it against its checksums.

        Raises:
            DataError: a file is not as it was written.
        """
        for name, written in self._sums.items():
            if _crc32(self.folder / name) != written:
                raise DataError(f"{self.folder / name} is not as it was written: {_AGAIN}")
        return self

    def __reduce__(self) -> tuple[type[Part], tuple[Path]]:
        return Part, (self.folder,)

    def lengths(self) -> np.ndarray:
        """Tokens of every example, int64 [examples]."""
        return np.diff(self.index[:, 0], prepend=0)

    def learned_within(self, most: int, *, first: int) -> np.ndarray:
        """Learned tokens of every example among its tokens [first, most), int64 [examples]."""
        spans = self.spans
        counted = np.minimum(spans[:, 1], most) - np.maximum(spans[:, 0], first)
        total = np.concatenate([[0], np.cumsum(np.maximum(counted, 0), dtype=np.int64)])
        return np.diff(total[self.index[:, 1]], prepend=0)

    def example(self, place: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """At most `most` tokens of an example, int32, and whether each is learned, bool."""
        start, first = self.index[place - 1, :2] if place else (0, 0)
        stop, last = self.index[place, :2]
        tokens = self.tokens[start : min(stop, start + most)]
        learned = np.zeros(len(tokens), dtype=np.bool_)
        for begin, end in self.spans[first:last]:
            learned[begin:end] = True
        return tokens, learned

    def left_out(self, name: str) -> Iterator[LeftOut]:
        """Rows that are not there; of `BAD_ROWS` or `CONTAMINATED`."""
        with (self.folder / name).open(encoding="utf-8") as stream:
            for line in stream:
                row, number, reason = json.loads(line)
                yield row, number, reason


_AGAIN = "run asft data prepare again, into another directory or after removing this one"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a file that is there whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(path)
    _sync(path.parent)


def summed(value: dict[str, Any]) -> dict[str, Any]:
    """The same with a CRC-32 over it; `whole` holds the two against each other."""
    return {**value, "checksum": zlib.crc32(json.dumps(value, sort_keys=True).encode())}


def whole(value: dict[str, Any]) -> bool:
    """Whether a read object is what was written; one of an older version, without a checksum, counts as that."""
    rest = {key: kept for key, kept in value.items() if key != "checksum"}
    return "checksum" not in value or value == summed(rest)


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            found = zlib.crc32(block, found)
    return found


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object, or None where there is none or it is none of ours."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        known = {item.name for item in fields(Counts)}
        ours = set(value["counts"]) == known and set(value["sizes"]) == set(_FILES) and whole(value)
        return value if ours else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map(path: Path) -> np.ndarray:
    dtype, shape = _SHAPES[path.name]
    if path.stat().st_size == 0:  # which the system does not map
        return np.empty(0, dtype).reshape(shape)
    return np.asarray(np.memmap(path, dtype, mode="r")).reshape(shape)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def chunk_of(
    rows: int,
    examples: Sequence[tuple[np.ndarray, np.ndarray]],
    places: Sequence[tuple[int, int]],
    bad: list[LeftOut],
    contaminated: list[LeftOut],
) -> TokenizedChunk:
    """Joins examples to a chunk.

    Args:
        rows: of the chunk, those left out included.
        examples: tokens and learned mask of each.
        places: row (from the chunk's beginning) and line of each.
        bad, contaminated: rows left out.
    """
    lengths = np.asarray([len(tokens) for tokens, _ in examples], dtype=np.int64)
    ends = np.cumsum(lengths)
    learned = np.concatenate([np.empty(0, np.bool_), *(learned for _, learned in examples)])
    spans, counts = spans_of(learned, ends - lengths)
    index = np.empty((len(examples), 4), dtype=np.int64)
    index[:, 0] = ends
    index[:, 1] = np.cumsum(counts)
    index[:, 2:] = np.asarray(places, dtype=np.int64).reshape(-1, 2)
    tokens = np.concatenate([np.empty(0, np.int32), *(tokens for tokens, _ in examples)]).astype(np.int32)
    return TokenizedChunk(rows, tokens, spans, index, bad, contaminated)
