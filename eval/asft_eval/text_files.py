"""Files that users give: text in UTF-8, gzipped or not, and JSON in it. Whatever is wrong is a `ValueError` that says where."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_GZIP = b"\x1f\x8b"
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a pair that makes one sign, as JSON escapes it


def read_text(path: Path) -> str:
    """The text of a file, without the mark that some editors put in front.

    Raises:
        ValueError: it is damaged or not UTF-8.
        OSError: it cannot be read.
    """
    return decoded(path.read_bytes())


def decoded(raw: bytes) -> str:
    """What `read_text` says of these bytes."""
    if raw.startswith(_GZIP):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"damaged gzip: {error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8: byte {raw[error.start]:#04x}") from error


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """The lines that hold something, with their numbers from 1."""
    # Not splitlines: it would also cut at U+2028 and its like, which JSON allows within a text.
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        if line.strip():
            yield number, line


def parsed(text: str) -> Any:
    """A JSON value all of whose texts can be written down.

    Raises:
        ValueError: it is none.
    """
    try:
        value = json.loads(text)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{half} is half of a surrogate pair, which is no sign") from None
    return value


def bare_name(path: Path) -> Path:
    """The file's name without the ending of gzip."""
    return Path(path.name.removesuffix(".gz"))
