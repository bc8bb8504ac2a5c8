"""A reference whose hidden states were computed before: read from disk, only its head is held."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asft_nemo.checkpoint.dist_read import DistReader
from asft_nemo.reference.cache_store import CacheIdentity, CacheReader, CacheWriter
from asft_nemo.reference.resident import ResidentReference
from asft_nemo.reference.source import ReferenceBytes, ReferenceSource

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where this rank stands in its pipeline, as far as a cache must know.

    Attributes:
        last_stage: it holds the last pipeline stage; the others read nothing.
        tp_rank, tp_size: in its tensor-parallel group.
        cp_rank, cp_size: in its context-parallel group, whose ranks have different tokens of the same rows.
        sequence_parallel: hidden states hold 1 / tp_size of this rank's tokens.
    """

    last_stage: bool
    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    sequence_parallel: bool

    def rows(self, sequence_length: int) -> tuple[int, int]:
        """First and one past the last of the micro batch's positions that this rank's hidden states hold."""
        if not self.sequence_parallel:
            return 0, sequence_length
        size = sequence_length // self.tp_size
        return self.tp_rank * size, (self.tp_rank + 1) * size


def sample_ids(batch: dict[str, Any]) -> Tensor:
    """The example of each token, int64 [B, S] on the host; a micro batch gives it per token (packed) or per row."""
    ids: Tensor = batch["sample_id"].cpu()
    return ids if ids.ndim == 2 else ids.unsqueeze(1).expand_as(batch["tokens"])


def read_head(weights_dir: Path, *, tied: bool, first_row: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Rows of the base's head [rows, H] from a torch distributed checkpoint, without a model; rows past its end are zeros.

    Args:
        weights_dir: `weights/` of the base.
        tied: the head is the embedding.
        first_row, rows: this rank's part of the padded vocabulary.
        dtype: of the result.
    """
    key = "module.embedding.word_embeddings.weight" if tied else "module.output_layer.weight"
    with DistReader(weights_dir, summed=True) as reader:
        total, hidden = reader.tensors[key].size
        stored = torch.empty(max(min(total - first_row, rows), 0), hidden, dtype=reader.dtype(key))
        reader.read_rows(key, None, first_row, stored)
    head_VH = torch.zeros(rows, hidden, dtype=dtype)
    head_VH[: len(stored)] = stored.to(dtype)
    return head_VH.to(torch.cuda.current_device())


class CachedReference(ReferenceSource):
    """Hidden states from a cache that holds every example.

    Each rank of the last stage maps the files and reads the rows it needs: under sequence parallelism its own part of the sequence.
    Positions that do not count are zeros; no loss looks at them. While one micro batch is put together, the next ones are read ahead.

    Args:
        directory, identity: the cache, see `asft_nemo.reference.cache_store`.
        head_VH: this rank's rows of the frozen head; None before the last stage.
        place: this rank's.
    """

    def __init__(self, directory: Path, identity: CacheIdentity, *, head_VH: Tensor | None, place: Place):
        self.directory, self.identity, self.place = directory, identity, place
        self._head_VH = head_VH
        self._reader: CacheReader | None = None
        self.reopen()
        self.hit_rate: float | None = 1.0

    def reopen(self) -> None:
        """Looks again at what is stored (last stage only)."""
        if self.place.last_stage:
            if self._reader is not None:
                self._reader.close()
            self._reader = CacheReader(self.directory, self.identity)

    def missing(self, ids: Iterable[int]) -> list[int]:
        """Those of the examples that are not stored; known on the last stage, empty elsewhere."""
        return [] if self._reader is None else self._reader.missing(list(ids))

    def read_ahead(self, sample_ids: Sequence[int]) -> None:
        """See `ReferenceSource.read_ahead`. Asks for as much as may wait; `hidden` asks for the rest."""
        if self._reader is not None:
            self._reader.prefetch(list(sample_ids))

    def hidden(
        self, micro_batches: Sequence[dict[str, Any]], *, sequence_length: int, micro_batch_size: int
    ) -> list[Tensor]:
        """See `ReferenceSource.hidden`. No collectives."""
        if self._reader is None:
            return []
        wanted = [self._wanted(batch) for batch in micro_batches]
        for ids_N, offsets_N, _, _ in wanted[1:]:
            self._reader.prefetch(ids_N, offsets_N)
        # a micro batch holds this context-parallel rank's tokens only
        sizes = [
            (batch["tokens"].shape[0], self.place.rows(batch["tokens"].shape[1])) for batch in micro_batches
        ]
        return [
            self._filled(one, (stop - start, rows, self.identity.hidden_size))
            for one, (rows, (start, stop)) in zip(wanted, sizes, strict=True)
        ]

    def _wanted(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Example and offset of each token that counts in this rank's rows, and its place there: [N] each, examples together."""
        start, stop = self.place.rows(batch["tokens"].shape[1])
        row_N, position_N = batch["loss_mask"][:, start:stop].cpu().nonzero(as_tuple=True)
        ids_BS, offsets_BS = sample_ids(batch), batch["position_ids"].cpu()
        return ids_BS[row_N, position_N + start], offsets_BS[row_N, position_N + start], position_N, row_N

    def _filled(self, wanted: tuple[Tensor, Tensor, Tensor, Tensor], shape: tuple[int, int, int]) -> Tensor:
        assert self._reader is not None
        ids_N, offsets_N, position_N, row_N = wanted
        device = torch.cuda.current_device()
        hidden_SBH = torch.zeros(shape, dtype=self.identity.torch_dtype, device=device)
        rows_NH = self._reader.read(ids_N, offsets_N).to(device, non_blocking=True)
        hidden_SBH[position_N.to(device), row_N.to(device)] = rows_NH
        return hidden_SBH

    def head(self) -> Tensor | None:
        """See `ReferenceSource.head`."""
        return self._head_VH

    def held(self) -> ReferenceBytes:
        """See `ReferenceSource.held`."""
        device = 0 if self._head_VH is None else self._head_VH.nbytes
        return ReferenceBytes(device=device, disk=0 if self._reader is None else self._reader.bytes)


def store(
    writer: CacheWriter, batch: dict[str, Any], hidden_SBH: Tensor, *, wanted: set[int] | None = None
) -> int:
    """Writes a micro batch's hidden states of tokens that count, example by example.

    Args:
        writer: this rank's.
        batch: tokens, loss_mask, position_ids [B, S] and sample_id.
        hidden_SBH: of the whole sequence, [S, B, H]; tokens in any order, the same as the batch's.
        wanted: the examples to write; None for all. Filler items (negative ids) never are.

    Returns:
        Examples written.
    """
    ids_BS, mask_BS = sample_ids(batch), batch["loss_mask"].cpu()
    offsets_BS, written = batch["position_ids"].cpu(), 0
    for row, ids_S in enumerate(ids_BS):
        for sample in torch.unique(ids_S).tolist():
            if sample < 0 or (wanted is not None and sample not in wanted):
                continue
            position_N = (mask_BS[row] & (ids_S == sample)).nonzero().squeeze(1)
            offsets_N, order_N = offsets_BS[row, position_N].sort()
            rows_NH = hidden_SBH[position_N[order_N].to(hidden_SBH.device), row]
            writer.add(sample, offsets_N, rows_NH)
            written += 1
    return written


class FillingReference(ReferenceSource):
    """A resident reference that writes what it computes, and leaves when everything is written.

    A step whose examples are all stored is read, any other is computed by the resident chunks and stored. At the end of an epoch what
    was written becomes readable for all data-parallel ranks, and once nothing is missing the chunks are freed.

    Args:
        resident: computes what is missing.
        cached: reads what is there.
        writer: of the ranks that write (last stage, tensor rank 0), None on others.
        ids: all examples.
        steps_per_epoch: whole steps of one epoch, rounded up.
        groups: this rank's model-parallel group, and its context-parallel one: all ranks that compute the same rows must agree on each step.
    """

    def __init__(
        self,
        resident: ResidentReference,
        cached: CachedReference,
        writer: CacheWriter | None,
        *,
        ids: Sequence[int],
        steps_per_epoch: int,
        groups: Sequence[Any],
    ):
        self.resident: ResidentReference | None = resident
        self.cached, self.writer, self.ids = cached, writer, ids
        self.steps_per_epoch, self.groups = steps_per_epoch, groups
        self._stored: set[int] = set()
        self.hit_rate: float | None = 0.0
        self._collect()

    def start_step(self, step: int) -> None:
        """At the first step of an epoch: makes the rows written so far readable. Collective over all ranks there."""
        if step and step % self.steps_per_epoch == 0 and self.resident is not None:
            if self.writer is not None:
                self.writer.flush()
            torch.distributed.barrier()
            self.cached.reopen()
            self._stored.clear()
            self._collect()

    def _collect(self) -> None:
        missing = torch.tensor([len(self.cached.missing(self.ids))], device=torch.cuda.current_device())
        torch.distributed.all_reduce(missing, op=torch.distributed.ReduceOp.MAX)
        logger.info("reference cache: %d of %d examples are still missing", int(missing), len(self.ids))
        if not int(missing):
            self.resident = None

    def _all_stored(self, micro_batches: Sequence[dict[str, Any]]) -> bool:
        ids = torch.cat([sample_ids(batch).unique() for batch in micro_batches]).tolist()
        complete = torch.tensor([int(not self.cached.missing(ids))], device=torch.cuda.current_device())
        for group in self.groups:
            torch.distributed.all_reduce(complete, op=torch.distributed.ReduceOp.MIN, group=group)
        return bool(complete)

    def hidden(
        self, micro_batches: Sequence[dict[str, Any]], *, sequence_length: int, micro_batch_size: int
    ) -> list[Tensor]:
        """See `ReferenceSource.hidden`. Collectives: the resident chunks' where it is computed; before, one all-reduce of one
        value in each group.
        """
        shape = {"sequence_length": sequence_length, "micro_batch_size": micro_batch_size}
        if self.resident is None or self._all_stored(micro_batches):
            self.hit_rate = 1.0
            return self.cached.hidden(micro_batches, **shape)
        self.hit_rate = 0.0
        hidden = self.resident.hidden(micro_batches, **shape)
        for batch, hidden_SBH in zip(micro_batches, hidden, strict=False):  # empty before the last stage
            whole, whole_SBH = whole_micro_batch(batch, hidden_SBH, self.cached.place)
            if self.writer is not None:
                ids = set(sample_ids(whole).unique().tolist())
                new = set(self.cached.missing(ids)) - self._stored
                store(self.writer, whole, whole_SBH, wanted=new)
                self._stored |= new
        return hidden

    def read_ahead(self, sample_ids: Sequence[int]) -> None:
        """See `ReferenceSource.read_ahead`; what is not stored yet is passed over."""
        self.cached.read_ahead(sample_ids)

    def finish(self) -> None:
        """Makes durable what was written; called when training ends or a checkpoint is written."""
        if self.writer is not None:
            self.writer.flush()

    def head(self) -> Tensor | None:
        """See `ReferenceSource.head`."""
        return self.cached.head()

    def held(self) -> ReferenceBytes:
        """See `ReferenceSource.held`."""
        resident = 0 if self.resident is None else self.resident.held().device
        cached = self.cached.held()
        return ReferenceBytes(device=resident + cached.device, disk=cached.disk)


def whole_micro_batch(
    batch: dict[str, Any], hidden_SBH: Tensor, place: Place
) -> tuple[dict[str, Any], Tensor]:
    """What `store` reads, of all tokens of a micro batch of which this rank has a part.

    Collectives: under sequence parallelism one all-gather of hidden states over the tensor-parallel group; under context parallelism
    one more over that group, and one of three numbers a token.

    Returns:
        ``loss_mask``, ``position_ids`` and ``sample_id``, [B, S], and hidden states [S, B, H]; their tokens are in the row's order, or one
        context-parallel rank's behind the other's.
    """
    hidden_SBH = whole_sequence(hidden_SBH, place)
    if place.cp_size == 1:
        return batch, hidden_SBH
    from megatron.core.parallel_state import get_context_parallel_group
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    group = get_context_parallel_group()
    names = ("loss_mask", "position_ids", "sample_id")
    of_tokens = {**batch, "sample_id": sample_ids(batch)}
    numbers_SB3 = torch.stack([of_tokens[name].to(hidden_SBH.device).long() for name in names], dim=-1)
    numbers_SB3 = numbers_SB3.transpose(0, 1).contiguous()
    with torch.no_grad():
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=group)
        numbers_SB3 = gather_from_sequence_parallel_region(numbers_SB3, group=group)
    mask, *others = (numbers_SB3[..., index].transpose(0, 1) for index in range(len(names)))
    return dict(zip(names, (mask.bool(), *others), strict=True)), hidden_SBH


def whole_sequence(hidden_SBH: Tensor, place: Place) -> Tensor:
    """Hidden states of all the tensor-parallel group's positions; under sequence parallelism one all-gather over it, else as they are."""
    if not place.sequence_parallel:
        return hidden_SBH
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    with torch.no_grad():
        return gather_from_sequence_parallel_region(hidden_SBH)
