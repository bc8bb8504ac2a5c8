"""A second, frozen model in the policy's layout."""

from __future__ import annotations

from asft_nemo.reference.frozen import FrozenBase


class ResidentReference(FrozenBase):
    """The base's weights on the device for the whole run."""
