"""What wandb wrote for later, read without wandb's own reader."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path


def history(folder: Path) -> list[dict[str, float]]:
    """What was logged, read from the file that `wandb sync` sends: records of wandb's protocol in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    rows = []
    for content in log_records(file.read_bytes()):
        record = Record.FromString(content)
        if record.HasField("history"):
            items = record.history.item
            rows.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            )
    return rows


def log_records(data: bytes, block: int = 32768) -> Iterator[bytes]:
    """Records of a LevelDB log behind wandb's header of 7 bytes: checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""
