"""Which layers, and what beside them, each pipeline rank has: the arithmetic of `get_num_layers_to_build` (megatron-core 0.15.3)."""

from __future__ import annotations

from dataclasses import dataclass

from asft_nemo.config.schema import ParallelConfig


@dataclass(frozen=True)
class Chunk:
    """One virtual stage of one pipeline rank; the whole rank where there are no virtual stages.

    Attributes:
        layers: transformer layers.
        embedding: it looks tokens up.
        head: it has the final norm, the head and the loss.
    """

    layers: int
    embedding: bool = False
    head: bool = False


def pipeline_chunks(layout: ParallelConfig, num_layers: int) -> tuple[tuple[Chunk, ...], ...]:
    """The chunks of every pipeline rank, in the order in which a rank runs them.

    Args:
        layout: one that the rules of `asft_nemo.config.pipeline_rules` let pass.
        num_layers: of the model.
    """
    return tuple(_rank(layout, num_layers, rank) for rank in range(layout.pp_size))


def rank_layers(layout: ParallelConfig, num_layers: int, rank: int) -> int:
    """What a pipeline rank gets of the layers, the embedding and the loss counted among them where they count as one."""
    given = {0: layout.first_stage_layers, layout.pp_size - 1: layout.last_stage_layers}
    own = {stage: layers for stage, layers in given.items() if layers is not None and layout.pp_size > 1}
    if rank in own:
        return own[rank]
    counted = layout.account_for_embedding + layout.account_for_loss
    return (num_layers + counted - sum(own.values())) // (layout.pp_size - len(own))


def _rank(layout: ParallelConfig, num_layers: int, rank: int) -> tuple[Chunk, ...]:
    stages = layout.vpp_size or 1
    share = rank_layers(layout, num_layers, rank) // stages
    chunks = []
    for stage in range(stages):
        first = rank == 0 and stage == 0
        last = rank == layout.pp_size - 1 and stage == stages - 1
        less = (first and layout.account_for_embedding) + (last and layout.account_for_loss)
        chunks.append(Chunk(share - less, first, last))
    return tuple(chunks)
