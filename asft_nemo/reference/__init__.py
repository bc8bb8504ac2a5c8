"""The frozen reference: always the base checkpoint the run started from. And the policy's own snapshot, which is no reference."""

from asft_nemo.reference.prepass import forward_hidden
from asft_nemo.reference.resident import ResidentReference
from asft_nemo.reference.snapshot import PolicySnapshot
from asft_nemo.reference.source import ReferenceSource

__all__ = ["PolicySnapshot", "ReferenceSource", "ResidentReference", "forward_hidden"]
