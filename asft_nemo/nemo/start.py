"""What all ranks of a run begin with: the same checkpoint, or all the base; the same data."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from asft_nemo.data import Prepared
from asft_nemo.errors import CheckpointError, DataError


class SameStart(Callback):
    """Refuses to train where ranks found different checkpoints under `latest`, or different data.

    A network file system may show a machine a link as it was a minute ago. Ranks that are started again soon after a checkpoint would then read
    parts of two models, and each would think another step the next.

    Args:
        resume: the checkpoint that this rank goes on from; None for the base.
        data: what this rank prepared.
    """

    def __init__(self, resume: Path | None, data: Prepared):
        self._resume, self._data = resume, data

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The process groups are there, nothing has been read. Collective: two gathers of a few words over all ranks.

        Raises:
            CheckpointError, DataError: on every rank, naming who found what.
        """
        check_same_data(self._data)
        found = _gathered("the base" if self._resume is None else self._resume.name)
        if len(set(found)) == 1:
            return
        told = ", ".join(f"{name} on {_ranks(found, name)}" for name in sorted(set(found)))
        raise CheckpointError(
            f"the ranks would not all go on from the same checkpoint: {told}; a network file system shows some machines what was there a moment ago: "
            "start the run again in a minute, with trainer.resume=must"
        )


def check_same_data(data: Prepared) -> None:
    """Compares what the ranks prepared: none sends its micro batches to another. Collective: one gather of a few words over all ranks.

    With other rows on one machine, the first stage of a pipeline would read other examples than the last one's labels are of, and
    nothing would fail.

    Raises:
        DataError: on every rank, naming two ranks that differ.
    """
    own = (data.fingerprint, data.max_steps)
    told = _gathered((own, socket.gethostname()))
    found = [those for those, _ in told]
    if len(set(found)) == 1:
        return
    other = next(rank for rank, those in enumerate(found) if those != found[0])
    raise DataError(
        f"the ranks have different data: those of rank 0 on {told[0][1]} and of rank {other} on {told[other][1]} differ in their rows, their tokenizer or their "
        "settings: give data.train, data.validation and model.path as paths under which all machines find the same files"
    )


def _gathered(own: Any) -> list[Any]:
    """Every rank's."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return found


def _ranks(found: list[Any], name: str) -> str:
    """Ranks that found it, at most the first four by number."""
    those = [str(rank) for rank, own in enumerate(found) if own == name]
    more = f" and {len(those) - 4} more" if len(those) > 4 else ""
    return f"rank {those[0]}" if len(those) == 1 else f"ranks {', '.join(those[:4])}{more}"
