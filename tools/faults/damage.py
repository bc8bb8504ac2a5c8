"""What can happen to a file: each function does it to one and says where."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path, random.Random, Path], str]

KEYS_OF_VERSIONS = ("format", "version", "format_version", "schema_version", "sharded_backend_version")


def truncated(path: Path, chance: random.Random, twin: Path) -> str:
    """Cut at some byte, as by a copy that was broken off."""
    size = path.stat().st_size
    kept = chance.randrange(size // 10, max(size // 10 + 1, size - 1))
    os.truncate(path, kept)
    return f"after byte {kept} of {size}"


def tail_cut(path: Path, chance: random.Random, twin: Path) -> str:
    """The last bytes are missing."""
    size = path.stat().st_size
    cut = min(size, chance.randrange(1, 9))
    os.truncate(path, size - cut)
    return f"the last {cut} bytes of {size}"


def emptied(path: Path, chance: random.Random, twin: Path) -> str:
    """No byte is left."""
    os.truncate(path, 0)
    return "0 bytes"


def missing(path: Path, chance: random.Random, twin: Path) -> str:
    """The file is gone."""
    path.unlink()
    return "gone"


def grown(path: Path, chance: random.Random, twin: Path) -> str:
    """Somebody's bytes are behind it."""
    more = chance.randrange(1, 65)
    with path.open("ab") as stream:
        stream.write(chance.randbytes(more))
    return f"{more} bytes more"


def flipped(path: Path, chance: random.Random, twin: Path) -> str:
    """One bit is another; size and times are as before, as when a disk does it."""
    state = path.stat()
    place, bit = chance.randrange(state.st_size), chance.randrange(8)
    with path.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ (1 << bit)]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    return f"byte {place} of {state.st_size}, bit {bit}"


def zeroed(path: Path, chance: random.Random, twin: Path) -> str:
    """A block is zeros: what a file system may leave after a crash."""
    state = path.stat()
    length = min(4096, max(1, state.st_size // 2))
    place = chance.randrange(max(1, state.st_size - length))
    with path.open("r+b") as stream:
        stream.seek(place)
        stream.write(bytes(length))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    return f"{length} bytes from {place} of {state.st_size}"


def wrong_version(path: Path, chance: random.Random, twin: Path) -> str:
    """It says that a later version of this project, or another program, wrote it."""
    value = json.loads(path.read_text())
    key = next(key for key in KEYS_OF_VERSIONS if key in value)
    value[key] = value[key] + 1 if isinstance(value[key], int) else f"{value[key]} 2"
    path.write_text(json.dumps(value))
    return f"{key}={value[key]}"


def swapped(path: Path, chance: random.Random, twin: Path) -> str:
    """It is another run's file of the same name."""
    shutil.copyfile(twin, path)
    return "another run's"


def directory(path: Path, chance: random.Random, twin: Path) -> str:
    """A folder has its name."""
    path.unlink()
    path.mkdir()
    return "a folder"


def unreadable(path: Path, chance: random.Random, twin: Path) -> str:
    """Its mode lets nobody read it."""
    path.chmod(0)
    return "mode 000"


def no_json_object(path: Path, chance: random.Random, twin: Path) -> str:
    """Good JSON of another form."""
    value: Any = chance.choice([[], None, 3, "text", {}])
    path.write_text(json.dumps(value) + "\n")
    return json.dumps(value)


def line_broken(path: Path, chance: random.Random, twin: Path) -> str:
    """A line that is not the last is cut: no writer that was stopped leaves that."""
    lines = path.read_text().splitlines(keepends=True)
    place = chance.randrange(len(lines) - 1)
    lines[place] = lines[place][: len(lines[place]) // 2] + "\n"
    path.write_text("".join(lines))
    return f"line {place + 1} of {len(lines)}"


BY_NAME: dict[str, Damage] = {
    one.__name__: one
    for one in (
        truncated,
        tail_cut,
        emptied,
        missing,
        grown,
        flipped,
        zeroed,
        wrong_version,
        swapped,
        directory,
        unreadable,
        no_json_object,
        line_broken,
    )
}
BOUND = ("unreadable",)  # by modes: root reads what they forbid
