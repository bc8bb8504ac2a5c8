"""The hidden-state cache of a run: what it is valid for, and the reference that reads or fills it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state

from asft_nemo.config.schema import RunConfig
from asft_nemo.data import Prepared
from asft_nemo.data.fingerprint import files_fingerprint, template_fingerprint, tokenizer_fingerprint
from asft_nemo.errors import CacheError
from asft_nemo.model import ModelSpec, padded_vocab_size
from asft_nemo.nemo.precision import precision_row, reference_precision
from asft_nemo.reference.cache_store import (
    CacheIdentity,
    CacheReader,
    CacheWriter,
    check_identity,
    open_or_create,
    require_space,
)
from asft_nemo.reference.cached import CachedReference, FillingReference, Place, read_head
from asft_nemo.reference.fingerprint import weights_fingerprint
from asft_nemo.reference.resident import ResidentReference
from asft_nemo.reference.source import ReferenceSource
from asft_nemo.run_dir import cache_dir, hf_dir

Found = TypeVar("Found")

_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def cache_identity(run: RunConfig, *, spec: ModelSpec, data: Prepared, base_dir: Path) -> CacheIdentity:
    """What the run's cached rows depend on. Reads every data file and parts of the base weights."""
    return CacheIdentity(
        base=weights_fingerprint(base_dir / "weights"),
        tokenizer=tokenizer_fingerprint(hf_dir(run)),
        template=template_fingerprint(run.data),
        data=files_fingerprint([*run.data.train, *run.data.validation]),
        sequence_length=run.data.sequence_length,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        num_samples=len(all_sample_ids(data)),
        dtype=_DTYPE_NAMES[precision_row(reference_precision(run)).compute_dtype],
        precision=reference_precision(run),
    )


def all_sample_ids(data: Prepared) -> list[int]:
    """Ids of all examples that a run reads, validation included."""
    ids = data.train.sample_ids.tolist()
    return ids if data.validation is None else ids + data.validation.sample_ids.tolist()


def layout_of(run: RunConfig) -> dict[str, object]:
    """What a manifest says of the job that made the cache."""
    layout = run.parallel
    return {
        "tp_size": layout.tp_size,
        "pp_size": layout.pp_size,
        "vpp_size": layout.vpp_size,
        "cp_size": layout.cp_size,
        "sequence_parallel": layout.sequence_parallel,
        "micro_batch_size": run.trainer.micro_batch_size,
    }


def this_place(run: RunConfig) -> Place:
    """This rank's place. The model-parallel groups must exist."""
    return Place(
        last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=run.parallel.tp_size,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=run.parallel.cp_size,
        sequence_parallel=run.parallel.sequence_parallel,
    )


def writes(place: Place) -> bool:
    """Whether this rank writes the rows of its pipeline, and of those that share its sequences."""
    return place.last_stage and place.tp_rank == place.cp_rank == 0


def on_first_rank(action: Callable[[], Found]) -> Found:
    """Does something on rank 0 while the others wait, and returns on every rank what came of it. Collective over all ranks.

    Raises:
        CacheError: what rank 0 met, on every rank.
    """
    told: list[Any] = [None, None]  # what went wrong, what was found
    if torch.distributed.get_rank() == 0:
        try:
            told[1] = action()
        except CacheError as error:
            told[0] = str(error)
    torch.distributed.broadcast_object_list(told, src=0)  # on the group's own device: NCCL's has no other
    if told[0] is not None:
        raise CacheError(told[0])
    return told[1]


def on_every_rank(action: Callable[[], Found]) -> list[Found]:
    """Does something on every rank, and returns on each what came of it, by rank. Collective over all ranks.

    Raises:
        CacheError: what the first rank met that met one, on every rank.
    """
    told: list[Any] = [None, None]
    try:
        told[1] = action()
    except CacheError as error:
        told[0] = str(error)
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, told)
    for wrong, _ in everyone:
        if wrong is not None:
            raise CacheError(wrong)
    return [found for _, found in everyone]


def open_with_room(
    run: RunConfig, identity: CacheIdentity, data: Prepared, *, share: float = 1.0
) -> list[int]:
    """On one rank: makes or checks the folder, and looks whether what it lacks fits on its disk.

    Args:
        run, identity, data: settings, what the cache is valid for, examples.
        share: of the training examples that will be stored.

    Returns:
        The examples that are not stored.

    Raises:
        CacheError: the folder holds another cache or a damaged one, cannot be written, or is too small.
    """
    directory = cache_dir(run)
    open_or_create(directory, identity, written_by=layout_of(run))
    with CacheReader(directory, identity) as reader:
        missing = reader.missing(all_sample_ids(data))
    rows = share * data.train.learned_tokens(missing)
    if data.validation is not None:
        rows += data.validation.learned_tokens(missing)
    require_space(directory, identity, rows=int(rows))
    return missing


def first_epochs_share(run: RunConfig, data: Prepared) -> float:
    """Of the training examples, those that a run comes by in its first epoch: fewer than all where it is shorter."""
    return min(1.0, data.max_steps * run.trainer.global_batch_size / len(data.train))


def _cached(run: RunConfig, spec: ModelSpec, identity: CacheIdentity, base_dir: Path) -> CachedReference:
    place = this_place(run)
    head_VH = None
    if place.last_stage:
        rows = padded_vocab_size(spec.vocab_size, tp_size=place.tp_size) // place.tp_size
        head_VH = read_head(
            base_dir / "weights",
            tied=spec.tie_word_embeddings,
            first_row=place.tp_rank * rows,
            rows=rows,
            dtype=precision_row(reference_precision(run)).compute_dtype,
        )
    return CachedReference(cache_dir(run), identity, head_VH=head_VH, place=place)


def cached_reference(run: RunConfig, *, spec: ModelSpec, data: Prepared, base_dir: Path) -> ReferenceSource:
    """The reference of `reference=cached`, `reference.fill=job`. Collective over all ranks.

    Raises:
        CacheError: there is no cache, it was written for another run, or examples are missing.
    """
    identity = cache_identity(run, spec=spec, data=data, base_dir=base_dir)
    on_first_rank(lambda: check_identity(cache_dir(run), identity))
    reference = _cached(run, spec, identity, base_dir)
    missing = torch.tensor([len(reference.missing(all_sample_ids(data)))], device=torch.cuda.current_device())
    torch.distributed.all_reduce(missing, op=torch.distributed.ReduceOp.MAX)
    if int(missing):
        raise CacheError(
            f"the cache in {cache_dir(run)} lacks {int(missing)} of {identity.num_samples} examples: finish it with `asft cache-reference` and "
            "the same settings, or set reference.fill=first_epoch"
        )
    return reference


def filling_reference(
    run: RunConfig,
    resident: Callable[[], ResidentReference],
    *,
    spec: ModelSpec,
    data: Prepared,
    base_dir: Path,
) -> ReferenceSource:
    """The reference of `reference=cached`, `reference.fill=first_epoch`. Collective over all ranks.

    Raises:
        CacheError: the folder holds another cache, cannot be written, or is too small.
    """
    identity = cache_identity(run, spec=spec, data=data, base_dir=base_dir)
    on_first_rank(lambda: open_with_room(run, identity, data, share=first_epochs_share(run, data)))
    cached = _cached(run, spec, identity, base_dir)
    dp_rank = parallel_state.get_data_parallel_rank()
    writer = CacheWriter(cache_dir(run), dp_rank, identity) if writes(cached.place) else None
    return FillingReference(
        resident(),
        cached,
        writer,
        ids=all_sample_ids(data),
        steps_per_epoch=-(-len(data.train) // run.trainer.global_batch_size),
        groups=(parallel_state.get_model_parallel_group(), parallel_state.get_context_parallel_group()),
    )
