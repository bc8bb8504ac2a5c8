"""What a step's micro batches get ahead of the training schedule: from the frozen reference and from the policy's snapshot.

Both are sources of hidden states (see `asft_nemo.reference.source`). What is made of them is a row of `FEEDS`, and an objective gets
the rows it reads: the reference's hidden states themselves for a divergence, or the log probability of the label alone, which keeps
one number per token.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from asft_nemo.losses import VocabShard, fused_label_logprob
from asft_nemo.objectives import Objective
from asft_nemo.profiling.rooms import room
from asft_nemo.reference import ReferenceSource

logger = logging.getLogger(__name__)

MicroBatch = dict[str, Any]


@dataclass(frozen=True)
class LastStage:
    """What the last stage knows when it feeds a micro batch.

    Attributes:
        head_VH: the source's head, this rank's vocabulary rows.
        shard: which rows these are.
        chunk_tokens: tokens per visit of the head, or ``auto``.
    """

    head_VH: Tensor
    shard: VocabShard
    chunk_tokens: int | str


def _hidden_states(batch: MicroBatch, hidden_SBH: Tensor, stage: LastStage, name: str) -> None:
    batch[f"{name}_hidden"], batch[f"{name}_head"] = hidden_SBH, stage.head_VH


def _label_logprob(batch: MicroBatch, hidden_SBH: Tensor, stage: LastStage, name: str) -> None:
    labels_SB = batch["labels"].transpose(0, 1)
    logprob_T = fused_label_logprob(
        hidden_SBH.flatten(0, 1),
        stage.head_VH,
        labels_SB.reshape(-1),
        batch["loss_mask"].transpose(0, 1).reshape(-1),
        shard=stage.shard,
        chunk_tokens=stage.chunk_tokens,
    )
    batch[f"{name}_logprob"] = logprob_T.view(labels_SB.shape).transpose(0, 1)


#: what an objective reads -> (source, what is made of its hidden states)
FEEDS: dict[str, tuple[str, Callable[[MicroBatch, Tensor, LastStage, str], None]]] = {
    "ref_hidden": ("ref", _hidden_states),
    "ref_label_logprob": ("ref", _label_logprob),
    "old_label_logprob": ("old", _label_logprob),
}


@functools.cache
def _say_once(text: str) -> None:
    logger.warning("%s", text)


def _joined(micro_batches: Sequence[MicroBatch], together: int) -> Sequence[MicroBatch]:
    """Every `together` micro batches as one, for what the reference reads of them."""
    if together == 1:
        return micro_batches
    keys = [key for key in ("tokens", "loss_mask", "position_ids", "sample_id") if key in micro_batches[0]]
    return [
        {key: torch.cat([batch[key] for batch in micro_batches[start : start + together]]) for key in keys}
        for start in range(0, len(micro_batches), together)
    ]


@dataclass(frozen=True)
class Prepass:
    """The forward-only passes of one run.

    Attributes:
        objective: says what is read.
        shard: this rank's vocabulary rows.
        chunk_tokens: of the fused loss.
        sources: ``ref`` and ``old`` where the objective reads something of them.
        ref_micro_batch_size: examples of one of the reference's micro batches; None for the policy's.
        vp_size: virtual stages, None for none.
        pp_size: pipeline stages.
        kept_bytes: of the last step's hidden states, by source; on the last stage.
    """

    objective: Objective
    shard: VocabShard
    chunk_tokens: int | str
    sources: dict[str, ReferenceSource]
    ref_micro_batch_size: int | None
    vp_size: int | None
    pp_size: int
    kept_bytes: dict[str, int] = field(default_factory=dict)

    def _together(self, num_micro_batches: int, micro_batch_size: int) -> int:
        """How many of the policy's micro batches make one of the reference's; 1 where the asked size does not suit, which is said."""
        size = self.ref_micro_batch_size
        if size is None or size == micro_batch_size:
            return 1
        together = size // micro_batch_size
        number, rest = divmod(num_micro_batches, together)
        if rest or (self.vp_size is not None and number % self.pp_size):
            unit = f"a multiple of pp_size={self.pp_size}, which virtual stages need" if not rest else "whole"
            _say_once(
                f"reference.micro_batch_size={size} would make {num_micro_batches / together:g} reference micro batches a step, not {unit}: "
                f"the policy's size {micro_batch_size} is used"
            )
            return 1
        return together

    def feed(
        self, micro_batches: Sequence[MicroBatch], *, sequence_length: int, micro_batch_size: int
    ) -> None:
        """Runs every source over the micro batches and puts what the objective reads into them (last stage only).

        Adds ``ref_hidden`` [S, B, H] and ``ref_head`` [V, H], ``ref_logprob`` and ``old_logprob`` [B, S].

        Collectives: those of the sources' pipelines; for log probabilities one all-gather of 3 numbers per valid token and chunk, and
        under sequence parallelism one of the hidden states.
        """
        with room("reference"):
            self._feed(micro_batches, sequence_length, micro_batch_size)

    def _feed(self, micro_batches: Sequence[MicroBatch], sequence_length: int, micro_batch_size: int) -> None:
        for name, source in self.sources.items():
            together = self._together(len(micro_batches), micro_batch_size)
            joined = _joined(micro_batches, together)
            hidden = [
                part_SBH
                for hidden_SBH in source.hidden(
                    joined, sequence_length=sequence_length, micro_batch_size=together * micro_batch_size
                )
                for part_SBH in hidden_SBH.split(micro_batch_size, dim=1)
            ]
            self.kept_bytes[name] = sum(hidden_SBH.nbytes for hidden_SBH in hidden)
            head_VH = source.head()
            if head_VH is None:  # before the last stage
                continue
            stage = LastStage(head_VH, self.shard, self.chunk_tokens)
            makes = [
                make
                for what, (owner, make) in FEEDS.items()
                if owner == name and what in self.objective.reads
            ]
            for batch, hidden_SBH in zip(micro_batches, hidden, strict=True):
                for make in makes:
                    make(batch, hidden_SBH, stage, name)
