"""The forward-only pass of frozen chunks over a step's micro batches, ahead of the training schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from asft_nemo.profiling.rooms import FROZEN_MODEL, room


def _keep_hidden(output: Tensor, non_loss_data: bool = True) -> Tensor:
    """What Megatron collects on the last stage: the hidden states, apart from the tensor that the schedule may free."""
    assert non_loss_data
    return output.detach()


_CAUSAL = {"attention_mask": None}  # where the micro batch says nothing of it


def _forward_step(batches: Iterator[dict[str, Any]], model: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)
    with room(FROZEN_MODEL):
        output = model(
            input_ids=batch["tokens"], position_ids=batch["position_ids"], **batch.get("attention", _CAUSAL)
        )
    return output, partial(_keep_hidden)


def forward_hidden(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[dict[str, Any]],
    *,
    sequence_length: int,
    micro_batch_size: int,
) -> list[Tensor]:
    """Runs `chunks` over the micro batches with Megatron's own forward-only schedule (1F1B or interleaved), without gradients.

    Args:
        chunks: this rank's frozen model chunks, one per virtual stage; the last stage's returns final hidden states.
        micro_batches: ``tokens`` and ``position_ids``, int64 [B, S], on this rank's device; ``attention``, what the model gets beside
            them to keep packed examples apart, where rows are packed.
        sequence_length: S of the whole micro batch (tensor-parallel ranks together).
        micro_batch_size: B.

    Returns:
        One [S, B, H] tensor per micro batch on the last stage, in order; an empty list on other stages.

    Collectives: those of the layers and the pipeline's point-to-point exchanges; every rank of the pipeline must call it.
    """
    iterators = [iter(micro_batches) for _ in chunks]
    interleaved = len(chunks) > 1
    with torch.no_grad():
        collected = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators if interleaved else iterators[0],
            model=list(chunks) if interleaved else chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=sequence_length,
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return list(collected)
