"""The frozen reference: always the base checkpoint the run started from. And the policy's own snapshot, which is no reference.

The names below are imported when they are first used: all but the cache's files need Megatron, which takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asft_nemo.reference.offloaded import OffloadedReference
    from asft_nemo.reference.prepass import forward_hidden
    from asft_nemo.reference.resident import ResidentReference
    from asft_nemo.reference.snapshot import PolicySnapshot
    from asft_nemo.reference.source import ReferenceBytes, ReferenceSource

__all__ = [
    "OffloadedReference",
    "PolicySnapshot",
    "ReferenceBytes",
    "ReferenceSource",
    "ResidentReference",
    "forward_hidden",
]

_HOMES = {
    "OffloadedReference": "offloaded",
    "ReferenceBytes": "source",
    "PolicySnapshot": "snapshot",
    "ReferenceSource": "source",
    "ResidentReference": "resident",
    "forward_hidden": "prepass",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
