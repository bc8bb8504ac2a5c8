"""What a step's micro batches get ahead of the training schedule: from the frozen reference and from the policy's snapshot.

Both are sources of hidden states (see `asft_nemo.reference.source`). What is made of them is a row of `FEEDS`, and an objective gets
the rows it reads: the reference's hidden states themselves for a divergence, or the log probability of the label alone, which keeps
one number per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from asft_nemo.losses import VocabShard, fused_label_logprob
from asft_nemo.objectives import Objective
from asft_nemo.reference import ReferenceSource

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


@dataclass(frozen=True)
class Prepass:
    """The forward-only passes of one run.

    Attributes:
        objective: says what is read.
        shard: this rank's vocabulary rows.
        chunk_tokens: of the fused loss.
        sources: ``ref`` and ``old`` where the objective reads something of them.
    """

    objective: Objective
    shard: VocabShard
    chunk_tokens: int | str
    sources: dict[str, ReferenceSource]

    def feed(
        self, micro_batches: Sequence[MicroBatch], *, sequence_length: int, micro_batch_size: int
    ) -> None:
        """Runs every source over the micro batches and puts what the objective reads into them (last stage only).

        Adds ``ref_hidden`` [S, B, H] and ``ref_head`` [V, H], ``ref_logprob`` and ``old_logprob`` [B, S].

        Collectives: those of the sources' pipelines; for log probabilities one all-gather of 3 numbers per valid token and chunk, and
        under sequence parallelism one of the hidden states.
        """
        for name, source in self.sources.items():
            hidden = source.hidden(
                micro_batches, sequence_length=sequence_length, micro_batch_size=micro_batch_size
            )
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
