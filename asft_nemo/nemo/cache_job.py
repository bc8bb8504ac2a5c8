"""`asft cache-reference`: the frozen base over all examples, forward only, into the hidden-state cache."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides
from torch.distributed.constants import default_pg_timeout
from torch.utils.data import default_collate
from tqdm import tqdm

from asft_nemo.config.schema import RunConfig
from asft_nemo.cpu import backend
from asft_nemo.data import FILLER, PackedDataset, Prepared, SupervisedDataset
from asft_nemo.hang_watch import at
from asft_nemo.model import ModelSpec
from asft_nemo.nemo.build import model_config
from asft_nemo.nemo.cache import (
    cache_identity,
    layout_of,
    on_every_rank,
    on_first_rank,
    open_with_room,
    this_place,
    writes,
)
from asft_nemo.nemo.compat import end_groups
from asft_nemo.nemo.gpt_model import AnchoredGPTConfig
from asft_nemo.nemo.precision import precision_plugin, precision_row, reference_precision
from asft_nemo.nemo.references import alike, reference_config
from asft_nemo.nemo.start import check_same_data
from asft_nemo.nemo.steps import data_step
from asft_nemo.reference.cache_store import (
    CacheIdentity,
    CacheWriter,
    RepairReport,
    begin_repair,
    end_repair,
    set_damaged_aside,
)
from asft_nemo.reference.cached import store, whole_micro_batch
from asft_nemo.reference.resident import ResidentReference
from asft_nemo.run_dir import cache_dir

logger = logging.getLogger(__name__)

Items: TypeAlias = SupervisedDataset | PackedDataset

_SECONDS_BETWEEN_LINES = 15.0


def start_ranks(run: RunConfig) -> None:
    """torch.distributed and Megatron's groups of this layout, from torchrun's environment."""
    if torch.distributed.is_initialized():
        end_groups()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # NCCL's own 10 minutes would end a job whose ranks wait longer for one that looks through a large cache, or has more to do
        torch.distributed.init_process_group(
            "gloo" if backend.active() else "nccl", timeout=default_pg_timeout
        )
    layout = run.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=layout.vpp_size,
        context_parallel_size=layout.cp_size,
    )
    model_parallel_cuda_manual_seed(run.run.seed)


def frozen_model_config(run: RunConfig, spec: ModelSpec) -> AnchoredGPTConfig:
    """The config a training run's reference is built with: the policy's with the precision's dtypes, without training hooks."""
    config, plugin = model_config(run, spec), precision_plugin(run.precision)
    if plugin is not None:
        config = update_config_with_dtype_overrides(plugin.dtype_config, config)
    return reference_config(run, config)


def reference_micro_batch_size(run: RunConfig) -> int:
    """Examples of one of the reference's micro batches."""
    return run.reference.micro_batch_size or run.trainer.micro_batch_size


def micro_batches(
    data: Prepared, items: list[tuple[Items, int]], run: RunConfig
) -> Iterator[list[dict[str, Any]]]:
    """This rank's items as passes of micro batches of a training run's shape; the last pass is filled up with filler items."""
    size = reference_micro_batch_size(run)
    # enough to keep a pipeline busy, and a multiple of it, which interleaved stages need
    per_pass = 4 * run.parallel.pp_size
    filler = (data.train, FILLER)
    for start in range(0, len(items), size * per_pass):
        part = items[start : start + size * per_pass]
        part += [filler] * (size * per_pass - len(part))
        loaded = (
            default_collate([dataset[index] for dataset, index in part[first : first + size]])
            for first in range(0, len(part), size)
        )
        yield [data_step(iter([batch])) for batch in loaded]


def missing_items(
    data: Prepared, missing: set[int], *, dp_rank: int, dp_size: int
) -> list[tuple[Items, int]]:
    """(dataset, index) of the rows this data-parallel rank computes: every dp_size-th of those with an example that is missing."""
    found: list[tuple[Items, int]] = []
    for dataset in (data.train, data.validation):
        if isinstance(dataset, PackedDataset):
            found += [(dataset, index) for index in dataset.rows_with(missing)]
        elif dataset is not None:
            ids = dataset.sample_ids.tolist()
            found += [(dataset, index) for index, sample in enumerate(ids) if sample in missing]
    return found[dp_rank::dp_size]


def repair_together(run: RunConfig, identity: CacheIdentity) -> RepairReport:
    """Sets damaged shards aside, rewrites a damaged or missing manifest, and removes partial shards. Collective over all ranks.

    Each rank checks an equal part of the shards, so that none waits long for another.

    Raises:
        CacheError: no cache, or rows of another identity, or a shard cannot be read, or the folder cannot be written; on every rank. Shards that
            were found to be damaged before are set aside.
    """
    directory = cache_dir(run)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    plan = on_first_rank(lambda: begin_repair(directory, identity))
    progress = _Checked() if rank == 0 else None
    found = on_every_rank(
        lambda: set_damaged_aside(directory, identity, plan.shards[rank::ranks], progress=progress)
    )
    damaged = sorted(itertools.chain.from_iterable(found), key=lambda shard: shard.path)
    report = on_first_rank(lambda: end_repair(directory, identity, plan, damaged, written_by=layout_of(run)))
    logger.info("repair of %s: %s", directory, report)
    return report


def cache_reference(run: RunConfig, *, spec: ModelSpec, data: Prepared, base_dir: Path, repair: bool) -> None:
    """Computes and stores what is missing. Called on every rank; safe to kill anywhere and to start again.

    Args:
        run: the settings of the training run that will read the cache.
        spec: architecture of the base model.
        base_dir: the base checkpoint in NeMo form.
        data: the run's examples.
        repair: first check every stored row, and set damaged files aside so that only what they held is computed again.

    Raises:
        CacheError: the folder holds another cache or a damaged one, cannot be written, or is too small.
        DataError: other ranks prepared other data.
    """
    start_ranks(run)
    check_same_data(data)
    at("looking at the cache", may_take_long=True)
    directory = cache_dir(run)
    identity = cache_identity(run, spec=spec, data=data, base_dir=base_dir)
    if repair:
        repair_together(run, identity)
    # One look for all: the ranks of a pipeline must compute the same, and another job may finish a shard between two looks.
    missing = on_first_rank(lambda: open_with_room(run, identity, data))
    place, dp_rank = this_place(run), parallel_state.get_data_parallel_rank()
    items = missing_items(
        data, set(missing), dp_rank=dp_rank, dp_size=parallel_state.get_data_parallel_world_size()
    )
    at("loading the base", may_take_long=True)
    config = frozen_model_config(run, spec)
    reference = ResidentReference(
        lambda stage: alike(config.build_chunk(vp_stage=stage, returns_hidden=True), run),
        vp_size=run.parallel.vpp_size,
        weights_dir=base_dir / "weights",
        dtype=precision_row(reference_precision(run)).compute_dtype,
    )
    writer = CacheWriter(directory, dp_rank, identity) if writes(place) else None
    progress = _Progress(len(items), shown=writer is not None and dp_rank == 0)
    at("reading the examples of pass 1", may_take_long=True)
    for number, batches in enumerate(micro_batches(data, items, run), 1):
        at(f"pass {number}", waits=True)
        hidden = reference.hidden(
            batches,
            sequence_length=run.data.sequence_length,
            micro_batch_size=reference_micro_batch_size(run),
        )
        for batch, hidden_SBH in zip(batches, hidden, strict=False):  # empty before the last stage
            whole, whole_SBH = whole_micro_batch(batch, hidden_SBH, place)
            if writer is not None:
                progress.add(store(writer, whole, whole_SBH))
        at(f"reading the examples of pass {number + 1}")
    at("closing its part of the cache", may_take_long=True)
    if writer is not None:
        writer.close()
    progress.close()
    at("waiting for the others' parts", waits=True)
    torch.distributed.barrier()


class _Checked:
    """A line now and then of how far a repair has come on this rank."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, done: int, total: int, name: str) -> None:
        """See `Progress` of `asft_nemo.reference.cache_repair`."""
        now = time.monotonic()
        if now - self._said > _SECONDS_BETWEEN_LINES:
            self._said = now
            logger.info("repair: %.1f GB of this rank's %.1f GB are checked", done / 1e9, total / 1e9)


class _Progress:
    """A bar on a terminal, a line now and then elsewhere; silent where another rank shows it."""

    def __init__(self, total: int, *, shown: bool):
        self._shown, self._total, self._done = shown, total, 0
        self._bar = tqdm(
            total=total,
            desc="cache-reference",
            unit="example",
            disable=not shown or not (sys.stderr.isatty() or os.environ.get("ASFT_PROGRESS")),
        )
        self._started = self._said = time.monotonic()

    def add(self, examples: int) -> None:
        """Counts examples that were stored."""
        self._done += examples
        self._bar.update(examples)
        now = time.monotonic()
        if self._shown and self._bar.disable and now - self._said > _SECONDS_BETWEEN_LINES:
            self._said = now
            left = (now - self._started) / max(self._done, 1) * (self._total - self._done)
            logger.info(
                "cache-reference: %d of this rank's %d examples, about %.0f s left",
                self._done,
                self._total,
                left,
            )

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
