"""Reading the reference's hidden states by sample id and token offset, memory-mapped and checked."""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from asft_nemo.errors import CacheError
from asft_nemo.reference.cache_manifest import CacheIdentity, check_identity
from asft_nemo.reference.cache_prefetch import FileRange, Prefetcher
from asft_nemo.reference.cache_shard import (
    HEADER_BYTES,
    DamagedShard,
    Int64s,
    Integers,
    ShardIndex,
    ShardMap,
    as_int64,
    ranges,
    read_index,
    row_checksums,
    row_seeds,
    runs_of,
    shard_paths,
)

logger = logging.getLogger(__name__)

PREFETCH_BYTES = 1 << 30
# Each map holds an open file (Python keeps a descriptor of its own), of which a process often may have 1024: a quarter leaves room for
# data loaders and sockets. A shard that is mapped again costs one open, next to nothing beside reading its rows.
MAPPED_SHARDS = 256


class CacheReader:
    """Every finished shard of a cache at the time it is opened, by sample id and token offset.

    The index lies in memory: 8 bytes an example and 28 a run of neighbouring valid tokens. Rows are mapped and read when asked for;
    each row's checksum is checked every time it is read. Where an example was stored twice, the first by shard name counts.
    At most `MAPPED_SHARDS` files are mapped at a time, those read last. Not thread safe. An input-output error of the disk under a mapped page, or a file cut between the check of its size and
    the read, ends the process with SIGBUS, as with every memory map; a wrong row is never returned.

    Args:
        directory: `reference.cache_dir`.
        identity: what this run needs.
        prefetch_bytes: how much may wait for the prefetch thread.

    Attributes:
        num_samples, num_rows: what can be read.
        bytes: size of all shards on disk.

    Raises:
        CacheError: no cache, another identity, or a shard whose header or index is damaged or cannot be read.
    """

    def __init__(
        self, directory: str | Path, identity: CacheIdentity, *, prefetch_bytes: int = PREFETCH_BYTES
    ):
        self.directory, self.identity = Path(directory), identity
        check_identity(directory, identity)
        indices = [read_index(path, identity) for path in shard_paths(self.directory)]
        self._files = [index.file for index in indices]
        self._maps: OrderedDict[int, ShardMap] = OrderedDict()  # the one read last is the last
        self._prefetcher = Prefetcher(max_bytes=prefetch_bytes)
        self.bytes = sum(file.bytes for file in self._files)
        self._index(indices)
        self.num_samples, self.num_rows = self._ids.size, int(self._run_lengths.sum())

    def _index(self, shards: Sequence[ShardIndex]) -> None:
        """Lays the runs of all shards out in the order of their examples, so that one binary search finds any row."""
        none = np.zeros(0, dtype=np.int64)
        ids = np.concatenate([none, *(shard.sample_ids for shard in shards)])
        run_counts = np.concatenate([none, *(shard.run_counts for shard in shards)])
        run_starts = np.concatenate([none, *(shard.run_starts for shard in shards)])
        run_lengths = np.concatenate([none, *(shard.run_lengths for shard in shards)])
        run_rows = np.concatenate(
            [none, *(np.cumsum(shard.run_lengths) - shard.run_lengths for shard in shards)]
        )
        sizes = np.asarray([shard.run_starts.size for shard in shards], dtype=np.int64)
        run_shards = np.repeat(np.arange(len(shards), dtype=np.int32), sizes)
        # np.unique gives the first place of each id, and shards are in the order of their names.
        self._ids, first = np.unique(ids, return_index=True)
        counts = run_counts[first]
        order = ranges((np.cumsum(run_counts) - run_counts)[first], counts)
        self._run_lengths, self._run_rows, self._run_shards = (
            run_lengths[order],
            run_rows[order],
            run_shards[order],
        )
        # Position of an example times the sequence length plus the token offset: increasing from run to run.
        base = np.repeat(np.arange(self._ids.size, dtype=np.int64), counts) * self.identity.sequence_length
        self._run_keys = base + run_starts[order]

    def missing(self, sample_ids: Integers) -> list[int]:
        """Those of the samples that are not stored, in their order; negative ids (filler items) never are missing."""
        wanted = as_int64(sample_ids)
        return wanted[(wanted >= 0) & ~np.isin(wanted, self._ids)].tolist()

    def offsets(self, sample_id: int) -> Int64s:
        """Token offsets stored for a sample, int64 [n].

        Raises:
            CacheError: the sample is not stored.
        """
        entry = int(self._entries(np.asarray([sample_id], dtype=np.int64))[0])
        size = self.identity.sequence_length
        first, last = np.searchsorted(self._run_keys, [entry * size, (entry + 1) * size])
        return ranges(self._run_keys[first:last] - entry * size, self._run_lengths[first:last])

    def read(self, sample_ids: Integers, offsets: Integers, *, out: Tensor | None = None) -> Tensor:
        """Returns the rows of (sample, token offset) pairs, in their order, checked.

        Only what is asked for is read from disk (whole pages). Keep the pairs of an example together: neighbours are read in one go.

        Args:
            sample_ids: [n], the example of each wanted token.
            offsets: [n], its position in the unpacked example.
            out: where to put the rows, for example pinned memory: contiguous, on the CPU, [n, h], of the cache's dtype.

        Returns:
            [n, h] on the CPU; `out` if it was given.

        Raises:
            CacheError: a sample or token is not stored.
            DamagedShard: a row's checksum does not match, or a file is gone or cut.
            UnreadableShard: the system refuses to hand out a file.
        """
        ids_N, offsets_N = as_int64(sample_ids), as_int64(offsets)
        shards_N, rows_N = self._locate(ids_N, offsets_N)
        shape, dtype = (ids_N.size, self.identity.hidden_size), self.identity.torch_dtype
        if out is None:
            out = torch.empty(shape, dtype=dtype)
        if (
            tuple(out.shape) != shape
            or out.dtype != dtype
            or not out.is_contiguous()
            or out.device.type != "cpu"
        ):
            raise ValueError(f"out must be a contiguous CPU tensor {list(shape)} of {dtype}")
        if not ids_N.size:
            return out
        raw = out.view(torch.uint8).numpy()
        seeds_N = row_seeds(ids_N, offsets_N)
        touched: set[int] = set()
        for shard, start, stop in _pieces(shards_N):
            rows = rows_N[start:stop]
            mapped = self._mapped(shard, first_touch=shard not in touched)
            touched.add(shard)
            lows, counts = runs_of(rows)
            for low, count in zip(lows.tolist(), counts.tolist(), strict=True):
                mapped.announce(low, count)
            # mode="clip" copies straight into `out`; the row numbers come from the index and are in range.
            np.take(mapped.rows, rows, axis=0, out=raw[start:stop], mode="clip")
            wrong = row_checksums(raw[start:stop], seeds_N[start:stop]) != mapped.row_crc32[rows]
            if wrong.any():
                at = start + int(np.argmax(wrong))
                raise DamagedShard(
                    mapped.file.path,
                    f"the checksum of sample {ids_N[at]}, token offset {offsets_N[at]} does not match",
                )
        for shard in touched & self._maps.keys():
            self._maps[shard].forget()
        return out

    def prefetch(self, sample_ids: Integers, offsets: Integers | None = None) -> None:
        """Starts reading ahead in one background thread; returns at once. A hint: it raises nothing for what is not stored.

        Args:
            sample_ids: [n]; samples whose rows will be read.
            offsets: [n], where only these (sample, token offset) pairs will be read, as for `read`; else all rows.
        """
        ids = as_int64(sample_ids)
        stored = np.isin(ids, self._ids)
        if offsets is None:
            of_sample = {int(sample): self.offsets(int(sample)) for sample in ids[stored]}
            ids = np.repeat(
                np.asarray([*of_sample], dtype=np.int64), [part.size for part in of_sample.values()]
            )
            wanted = np.concatenate([np.zeros(0, dtype=np.int64), *of_sample.values()])
        else:
            ids, wanted = ids[stored], as_int64(offsets)[stored]
        try:
            shards_N, rows_N = self._locate(ids, wanted)
        except CacheError as error:
            logger.debug("prefetch: %s", error)
            return
        self._prefetcher.ask(self._file_ranges(shards_N, rows_N))

    def _file_ranges(self, shards_N: Int64s, rows_N: Int64s) -> list[FileRange]:
        size = self.identity.row_bytes
        found: list[FileRange] = []
        for shard, start, stop in _pieces(shards_N):
            lows, counts = runs_of(rows_N[start:stop])
            path = self._files[shard].path
            found += [
                (path, HEADER_BYTES + low * size, count * size)
                for low, count in zip(lows.tolist(), counts.tolist(), strict=True)
            ]
        return found

    def wait_prefetched(self, timeout: float) -> bool:
        """Waits until all that was asked for is read ahead; False where that took longer than `timeout` seconds."""
        return self._prefetcher.wait(timeout)

    @property
    def prefetched_bytes(self) -> int:
        """Bytes the background thread has read."""
        return self._prefetcher.bytes_read

    def _entries(self, ids_N: Int64s) -> Int64s:
        """Position of each id in the index."""
        entries = np.searchsorted(self._ids, ids_N)
        found = np.zeros(ids_N.size, dtype=bool)
        inside = entries < self._ids.size
        found[inside] = self._ids[entries[inside]] == ids_N[inside]
        if not found.all():
            absent = np.unique(ids_N[~found])
            raise CacheError(
                f"the cache in {self.directory} lacks {absent.size} of the wanted samples (the first is {absent[0]}):"
                " run `asft cache-reference` again, which computes what is missing"
            )
        return entries

    def _locate(self, ids_N: Int64s, offsets_N: Int64s) -> tuple[Int64s, Int64s]:
        """Shard number and row number of each pair."""
        if ids_N.shape != offsets_N.shape:
            raise ValueError(f"{ids_N.size} sample ids and {offsets_N.size} token offsets")
        size = self.identity.sequence_length
        keys = self._entries(ids_N) * size + offsets_N
        runs = np.searchsorted(self._run_keys, keys, side="right") - 1
        # Where no run begins at or before the key, -1 stands for the last run, which begins after it.
        within = keys - self._run_keys[runs] if self._run_keys.size else np.full(keys.size, -1)
        found = (within >= 0) & (offsets_N >= 0) & (offsets_N < size)
        found[found] &= within[found] < self._run_lengths[runs[found]]
        if not found.all():
            at = int(np.argmin(found))
            raise CacheError(
                f"the cache in {self.directory} has sample {ids_N[at]} without token offset {offsets_N[at]}: it was"
                " written with another loss mask; set another reference.cache_dir, or remove this one"
            )
        return self._run_shards[runs].astype(np.int64), self._run_rows[runs] + within

    def _mapped(self, shard: int, *, first_touch: bool) -> ShardMap:
        """The shard's map, checked once in each `read`; in place of the one that was not read for longest where there are enough."""
        mapped = self._maps.get(shard)
        if mapped is None:
            while len(self._maps) >= MAPPED_SHARDS:
                # Only the name is dropped: the file is unmapped when nobody looks at its rows any more.
                self._maps.popitem(last=False)
            mapped = self._maps[shard] = ShardMap(self._files[shard])
        elif first_touch:
            mapped.check_size()
        self._maps.move_to_end(shard)
        return mapped

    def close(self) -> None:
        """Ends the prefetch thread and unmaps the files."""
        self._prefetcher.close()
        self._maps.clear()

    def __enter__(self) -> CacheReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _pieces(shards_N: Int64s) -> list[tuple[int, int, int]]:
    """(shard, start, stop) of each stretch of neighbours in the same shard."""
    bounds = [0, *(np.flatnonzero(np.diff(shards_N)) + 1).tolist(), shards_N.size]
    return [(int(shards_N[start]), start, stop) for start, stop in itertools.pairwise(bounds) if stop > start]
