"""The old policy: a snapshot of the policy's weights, refreshed every few steps. Training state, not a reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch import nn

from asft_nemo.reference.frozen import FrozenChunks


class PolicySnapshot(FrozenChunks):
    """Frozen chunks that hold the policy's weights of an earlier step (psft's pi_old)."""

    def refresh(self, policy_chunks: Sequence[nn.Module]) -> None:
        """Copies the policy's weights.

        Args:
            policy_chunks: this rank's chunks of the policy, without wrappers, in the order of the virtual stages. Their parameters
                are whole on this rank (gathered, where a distributed optimizer gathers them late).

        Raises:
            RuntimeError: the chunks are not made alike.
        """
        with torch.no_grad():
            for own, policy in zip(self.chunks, policy_chunks, strict=True):
                source = dict(policy.named_parameters())
                target = dict(own.named_parameters())
                if source.keys() != target.keys():
                    raise RuntimeError(
                        f"the snapshot and the policy differ in {sorted(source.keys() ^ target.keys())}"
                    )
                for name, parameter in target.items():
                    parameter.copy_(source[name])

    def save(self, folder: Path) -> None:
        """Writes the weights as a torch distributed checkpoint into `folder`, which exists. Collective over all ranks."""
        dist_checkpointing.save(self.sharded_states(), str(folder))
