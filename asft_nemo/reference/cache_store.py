"""The reference's final hidden states on disk, keyed by sample id and token offset: written by many, read by all.

A folder holds manifest.json, which says what the rows depend on (`cache_manifest`), and shards (`cache_shard`). Rows are those of
label positions that count (loss mask True), keyed by the example and the position inside the unpacked example, so they
are valid under any packing, order, micro-batch split and layout. Writers share nothing but the folder: each finishes
shards of its own, and all finished shards together are the cache. A writer killed anywhere leaves its finished shards
and at most one partial file, which no reader looks at.

Nothing here knows of ranks or of Megatron.

    identity = CacheIdentity(base=..., ...)
    open_or_create(directory, identity, written_by={"tp_size": 2})              # every writer
    with CacheWriter(directory, writer_id, identity) as writer:
        writer.add(sample_id, offsets, rows)                                    # [n], [n, h]
    with CacheReader(directory, identity) as reader:
        reader.missing(sample_ids)                                              # what is left to compute
        reader.prefetch(next_ids, next_offsets)
        rows = reader.read(ids, offsets)                                        # [n], [n] -> [n, h]
"""

from asft_nemo.reference.cache_manifest import (
    CacheIdentity,
    check_identity,
    open_or_create,
    read_manifest,
    require_space,
)
from asft_nemo.reference.cache_reader import CacheReader
from asft_nemo.reference.cache_repair import (
    RepairReport,
    begin_repair,
    end_repair,
    set_damaged_aside,
    verify_cache,
)
from asft_nemo.reference.cache_shard import DamagedShard
from asft_nemo.reference.cache_writer import CacheWriter

__all__ = [
    "CacheIdentity",
    "CacheReader",
    "CacheWriter",
    "DamagedShard",
    "RepairReport",
    "begin_repair",
    "check_identity",
    "end_repair",
    "open_or_create",
    "read_manifest",
    "require_space",
    "set_damaged_aside",
    "verify_cache",
]
