"""Where all ranks of a run begin: at the same checkpoint, or all at the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from asft_nemo.errors import CheckpointError


class SameStart(Callback):
    """Refuses to train where ranks found different checkpoints under `latest`.

    A network file system may show a machine a link as it was a minute ago. Ranks that are started again soon after a checkpoint would then read
    parts of two models, and each would think another step the next.

    Args:
        resume: the checkpoint that this rank goes on from; None for the base.
    """

    def __init__(self, resume: Path | None):
        self._resume = resume

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The process groups are there, nothing has been read. Collective: one gather of a name over all ranks.

        Raises:
            CheckpointError: on every rank, naming who found what.
        """
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, "the base" if self._resume is None else self._resume.name)
        if len(set(found)) == 1:
            return
        told = ", ".join(f"{name} on {_ranks(found, name)}" for name in sorted(set(found)))
        raise CheckpointError(
            f"the ranks would not all go on from the same checkpoint: {told}; a network file system shows some machines what was there a moment ago: "
            "start the run again in a minute, with trainer.resume=must"
        )


def _ranks(found: list[Any], name: str) -> str:
    """Ranks that found it, at most the first four by number."""
    those = [str(rank) for rank, own in enumerate(found) if own == name]
    more = f" and {len(those) - 4} more" if len(those) > 4 else ""
    return f"rank {those[0]}" if len(those) == 1 else f"ranks {', '.join(those[:4])}{more}"
