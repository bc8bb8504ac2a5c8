"""The frozen reference: always the base checkpoint the run started from."""

from asft_nemo.reference.prepass import forward_hidden
from asft_nemo.reference.resident import ResidentReference
from asft_nemo.reference.source import ReferenceSource

__all__ = ["ReferenceSource", "ResidentReference", "forward_hidden"]
