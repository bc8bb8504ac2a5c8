"""What a finished checkpoint says of its own files, so that one that was cut, lost or changed afterwards is refused and not read.

`seal.json` beside `weights/` and `context/` holds the bytes of every file and its CRC-32, of large files of numbers that of some blocks: enough to tell one checkpoint's file from another's.
What lies between them is proven where it is read: each chunk of a `.distcp` file carries the CRC-32 that torch wrote (`DistReader.check_numbers`).
Checkpoints of other programs have no seal and are read as they are.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from asft_nemo.checkpoint.journal import JOURNAL_NAME
from asft_nemo.checkpoint.staging import write_synced
from asft_nemo.errors import CheckpointError

SEAL = Path("seal.json")
FORMAT = 2  # 1 took blocks of every large file
_WHOLE_BYTES = 1 << 20  # reading more of every file of numbers at every start would be felt
_BLOCK, _BLOCKS = 1 << 12, 16  # of a larger one
_NUMBERS = ".distcp"
_AGAIN = f"copy the checkpoint again, or remove its {SEAL} if you changed it on purpose"


def write_seal(checkpoint: Path) -> None:
    """Seals a checkpoint that is complete but for this file, and syncs it."""
    files = {str(path.relative_to(checkpoint)): _described(path) for path in _files(checkpoint)}
    values = {"format": FORMAT, "files": files}
    text = json.dumps({**values, "crc32": _sum_of(values)}, indent=1) + "\n"
    write_synced(checkpoint / SEAL, text.encode())


def check_seal(checkpoint: Path) -> None:
    """Holds a checkpoint's files against its seal, if it has one; files that the seal does not name are somebody's own.

    Raises:
        CheckpointError: a file is missing, of another size, or has other bytes.
    """
    path = checkpoint / SEAL
    if not os.path.lexists(path):
        return
    form, files = _read(path)
    for name, (nbytes, crc32) in files.items():
        file = checkpoint / name
        if not (checkpoint / Path(name).parts[0]).exists():
            continue  # `context/` may be left behind: an export takes --base then
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing, and was there when the checkpoint was written: {_AGAIN}"
            )
        size = file.stat().st_size
        if size != nbytes:
            raise CheckpointError(f"{file} has {size} bytes where {nbytes} were written: {_AGAIN}")
        if _crc32(file, size, blocks=form == 1) != crc32:
            raise CheckpointError(f"{file} is not as it was written: {_AGAIN}")


def _read(path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] > FORMAT:
            raise CheckpointError(
                f"{path} is of format {values['format']}, newer than {FORMAT}: upgrade asft_nemo"
            )
        stated = values.pop("crc32")
        if stated != _sum_of(values):
            raise ValueError("its checksum does not match")
        files = {name: (int(row["bytes"]), int(row["crc32"], 16)) for name, row in values["files"].items()}
        return int(values["format"]), files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): copy the checkpoint again") from error


def _sum_of(values: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def _files(checkpoint: Path) -> list[Path]:
    passing = (
        checkpoint / SEAL,
        checkpoint / JOURNAL_NAME,
    )  # this file, and one that goes when all others are there
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path not in passing)


def _described(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size, "crc32": f"{_crc32(path, size):08x}"}


def _crc32(path: Path, size: int, *, blocks: bool = False) -> int:
    """Of a file; of a large one of numbers, and with `blocks` of any large one, of evenly spaced blocks, the first and the last among them."""
    found = 0
    with path.open("rb") as stream:
        if size <= _WHOLE_BYTES or not (blocks or path.suffix == _NUMBERS):
            while read := stream.read(_WHOLE_BYTES):
                found = zlib.crc32(read, found)
            return found
        for number in range(_BLOCKS):
            stream.seek((size - _BLOCK) * number // (_BLOCKS - 1))
            found = zlib.crc32(stream.read(_BLOCK), found)
        return found
