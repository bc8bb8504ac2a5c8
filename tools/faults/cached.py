"""What a reference cache holds, for comparisons."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from asft_nemo.reference.cache_manifest import CacheIdentity
from asft_nemo.reference.cache_reader import CacheReader


def rows_of(directory: Path) -> dict[int, str]:
    """Every example of a cache: its offsets and rows as a digest.

    Raises:
        CacheError: it is damaged.
    """
    identity = CacheIdentity(**json.loads((directory / "manifest.json").read_text())["identity"])
    found: dict[int, str] = {}
    with CacheReader(directory, identity) as reader:
        lost = set(reader.missing(list(range(identity.num_samples))))
        for sample in set(range(identity.num_samples)) - lost:
            offsets = reader.offsets(sample)
            rows = reader.read([sample] * len(offsets), offsets)
            found[sample] = hashlib.sha256(offsets.tobytes() + rows.numpy().tobytes()).hexdigest()
    return found
