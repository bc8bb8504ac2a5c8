"""Datasets of the Hugging Face hub as entries of `data.train`: how they are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(:(?P<first>[\w.-]+))?(:(?P<second>[\w.-]+))?")
# A missing file is a missing file, though its name has the form of an id.
_FILE = re.compile(r"\.(jsonl?|ndjson|gz|zst|parquet|arrow|csv|tsv|txt|zip)$", re.IGNORECASE)


class HubId(NamedTuple):
    """A split of a dataset: `owner/name`, `owner/name:split` or `owner/name:configuration:split`."""

    repo: str
    configuration: str | None  # None = the only one
    split: str


def hub_id(name: str) -> HubId | None:
    """What an entry names on the hub; None where it does not have the form of an id, or its first part is a folder here, so that a mistyped
    path asks no hub. Whether a file of this name exists is asked before.
    """
    found = _ID.fullmatch(name)
    if found is None or _FILE.search(name) or name.startswith(".") or Path(found["repo"]).parent.is_dir():
        return None
    first, second = found["first"], found["second"]
    if second is not None:
        return HubId(found["repo"], first, second)
    return HubId(found["repo"], None, "train" if first is None else first)
