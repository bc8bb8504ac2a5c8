"""Files as rows: JSON Lines (plain, gzip, zstd), Parquet, and Arrow as `datasets.save_to_disk` writes it. Adding a format = one
function + one row of `_FORMATS`.

The format is told by a file's first bytes, not by its name. One line or one batch of rows is in memory at a time. What is wrong with
a row is its reason; a file that cannot be read at all raises `DataError`.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from asft_nemo.config.hub_ids import hub_id
from asft_nemo.data.hub import hub_files
from asft_nemo.data.records import kind
from asft_nemo.data.store import is_prepared
from asft_nemo.errors import DataError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

MOST_BYTES = (
    10 << 20
)  # of a line, or of a Parquet row's texts; longer ones are bad rows and never wholly in memory
_BATCH, _BATCH_BYTES = 1024, 1 << 20  # rows of a Parquet file at once, and about how much of them
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".parquet")  # what a directory is searched for
_TOO_LONG = f"longer than {MOST_BYTES >> 20} MiB: split it"
_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark is a prefix of it
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)

Rows = Iterator[tuple[int, "dict[str, Any] | str"]]
#: a row's number and its line, or the first row's number and an Arrow batch of at most `_BATCH` rows and, if more than one, `_BATCH_BYTES`
Piece = tuple[int, "bytes | RecordBatch"]
Pieces = Iterator[Piece]


def expand(name: str | Path) -> list[Path]:
    """The files that an entry of `data.train` stands for: itself, a pattern's matches, or what a directory holds; sorted. Where there is
    none, those of a dataset of the hub.

    Raises:
        DataError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _directory(path)
    found = sorted(Path(match) for match in glob.glob(str(name), recursive=True))
    found = [match for match in found if match.is_file()]
    if found:
        return found
    on_hub = hub_id(str(name))
    if on_hub is None:
        raise DataError(f"data file {name} does not exist (looked in {Path.cwd()}): correct data.train")
    return list(hub_files(str(name), on_hub))


def rows(path: Path) -> Rows:
    """All rows with their numbers (lines, or rows of a Parquet file; 1 for the first), each as an object or the reason why it is none.
    Blank lines are skipped.

    Raises:
        DataError: as `pieces`.
    """
    for piece in pieces(path):
        yield from decoded(piece)


def decoded(piece: Piece) -> Rows:
    """The rows of a piece."""
    number, content = piece
    if isinstance(content, bytes):
        yield number, parse(content)
    else:
        most = bytes_of(content)  # hardly any row needs to be measured by itself
        for place, row in enumerate(_values(content), start=number):
            yield place, _TOO_LONG if most > MOST_BYTES < _text_bytes(row) else row


def _values(batch: RecordBatch) -> list[dict[str, Any] | str]:
    """A batch's rows; of one that Python cannot hold, the reason. Arrow's writers do not look at what is in a text."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            return [row for place in range(batch.num_rows) for row in _values(batch.slice(place, 1))]
        if isinstance(error, UnicodeDecodeError):
            return [f"not UTF-8: byte {error.object[error.start]:#04x}"]
        return [f"a value that cannot be read ({' '.join(str(error).split())})"]


def _text_bytes(value: Any) -> int:
    """UTF-8 bytes of all texts in a row."""
    if isinstance(value, str):
        return len(value.encode())
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_text_bytes, inside))


def pieces(path: Path) -> Pieces:
    """A file as it is read, rows not decoded yet: what can be handed to another process.

    Raises:
        DataError: the file cannot be read, is damaged, or is of another format or encoding.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(10)
        read = next((read for mark, read in _FORMATS if start.startswith(mark)), None)
        if read is None:
            read = _arrow if path.suffix == ".arrow" else _plain
        yield from read(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.strerror is None:  # of Arrow's codecs, not of the system
            raise _damaged(path, error) from error
        raise unreadable(path, error) from error


def unreadable(path: str | Path, error: OSError) -> DataError:
    """The error about a file that the system does not let us read."""
    cure = "put it back" if isinstance(error, FileNotFoundError) else "correct its permissions"
    return DataError(f"data file {path} cannot be read ({error.strerror or error}): {cure}")


def parse(raw: bytes) -> dict[str, Any] | str:
    """A line's object, or why it is none."""
    if len(raw) > MOST_BYTES:
        return _TOO_LONG
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte {raw[error.start]:#04x} at column {error.start + 1}"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        return "not JSON that can be read: nested too deeply"
    except ValueError:  # Python reads no number of thousands of digits
        return "not JSON that can be read: a number is too long"
    if isinstance(value, list):
        return "a JSON array where one object a line is needed"
    if not isinstance(value, dict):
        return f"a JSON {kind(value)} where an object is needed"
    return value


def lines(stream: IO[bytes] | io.BufferedIOBase, path: Path) -> Iterator[tuple[int, bytes]]:
    """Non-blank lines with their numbers."""
    first = True
    for number, raw in enumerate(_split(stream), start=1):
        if number == 1:
            encoding = _other_encoding(raw)
            if encoding is not None:
                raise DataError(f"data file {path} is {encoding} text: convert it to UTF-8")
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if not raw.strip():
            continue
        if first and raw.lstrip().startswith(b"["):
            raise DataError(
                f"data file {path} is one JSON array: write one object a line (jq -c '.[]' does it)"
            )
        first = False
        yield number, raw


def _other_encoding(raw: bytes) -> str | None:
    """UTF-16 or UTF-32, by its mark or, since JSON begins with two ASCII characters, by where the zeros of the first ones stand."""
    for mark, encoding in _ENCODINGS:
        if raw.startswith(mark):
            return encoding
    zeros = tuple(byte == 0 for byte in raw[:4])
    if sum(zeros) == 3:
        return "UTF-32"
    return "UTF-16" if zeros in ((False, True, False, True), (True, False, True, False)) else None


def _split(stream: IO[bytes] | io.BufferedIOBase) -> Iterator[bytes]:
    """Lines; of one that is too long, its first bytes alone."""
    while raw := stream.readline(MOST_BYTES + 1):
        rest = raw
        while len(rest) > MOST_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(MOST_BYTES + 1)
        yield raw


def _plain(path: Path) -> Pieces:
    with path.open("rb") as stream:
        yield from lines(stream, path)


def _gzip(path: Path) -> Pieces:
    with gzip.open(path, "rb") as stream:
        yield from lines(stream, path)


def _zstd(path: Path) -> Pieces:
    import pyarrow

    with pyarrow.input_stream(str(path), compression="zstd") as native, io.BufferedReader(native) as stream:
        yield from lines(stream, path)


def _parquet(path: Path) -> Pieces:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _numbered(file.iter_batches(batch_size=_BATCH))
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from error


def _arrow(path: Path) -> Pieces:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            yield from _numbered(stream)
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from error


def _numbered(batches: Iterable[RecordBatch]) -> Pieces:
    number = 1
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            for part in _halved(batch.slice(start, _BATCH)):
                yield number, part
                number += part.num_rows


def _halved(batch: RecordBatch) -> Iterator[RecordBatch]:
    """A batch in pieces of few bytes."""
    shared = bytes_of(batch.slice(0, 0))  # dictionaries, which each slice has whole
    if batch.num_rows > 1 and bytes_of(batch) - shared > _BATCH_BYTES:
        half = batch.num_rows // 2
        yield from _halved(batch.slice(0, half))
        yield from _halved(batch.slice(half))
    else:
        yield _alone(batch)


def _alone(batch: RecordBatch) -> RecordBatch:
    """A batch without the memory around it, all of which would go to another process with it."""
    import pyarrow

    if batch.get_total_buffer_size() <= 2 * bytes_of(batch):
        return batch
    try:
        return batch.take(pyarrow.array(range(batch.num_rows)))
    except pyarrow.ArrowNotImplementedError:  # a type that cannot be taken from
        return batch


def bytes_of(batch: RecordBatch) -> int:
    """Of an Arrow batch; of types whose slices cannot be measured, all the memory behind it."""
    import pyarrow

    try:
        return batch.nbytes
    except pyarrow.ArrowTypeError:
        return batch.get_total_buffer_size()


def _zip(path: Path) -> Pieces:
    raise DataError(f"data file {path} is zip, which is not read: unpack it to JSON Lines")


_FORMATS: tuple[tuple[bytes, Callable[[Path], Pieces]], ...] = (
    (b"\x1f\x8b", _gzip),
    (b"\x28\xb5\x2f\xfd", _zstd),
    (b"PAR1", _parquet),
    (b"PK\x03\x04", _zip),
)


def _directory(folder: Path) -> list[Path]:
    if is_prepared(folder):
        raise DataError(
            f"{folder} was written by asft data prepare and is for data.train and data.validation: give the files it was made from"
        )
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(str(path.parent) for path in sorted(folder.glob("*/state.json")))
        raise DataError(f"{folder} holds several splits of a dataset: name one of {splits}")
    state = folder / "state.json"
    if state.is_file():  # what datasets.save_to_disk wrote
        try:
            parts = [folder / part["filename"] for part in json.loads(state.read_text())["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{state} is not what save_to_disk writes: save the dataset again") from error
        missing = [part for part in parts if not part.is_file()]
        if missing:
            raise DataError(f"{missing[0]} of the dataset in {folder} is missing: save the dataset again")
        return parts
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(_SUFFIXES))
    if not found:
        raise DataError(
            f"data directory {folder} holds no data file (none ends with {', '.join(_SUFFIXES)}): correct data.train"
        )
    return found


def _damaged(path: Path, error: BaseException) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"data file {path} is cut off or damaged ({reason}): fetch it again")
