"""A made-up reference: which tokens of an example are valid and what their hidden states are, from the sample id alone."""

import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import torch

from asft_nemo.reference.cache_store import (
    CacheIdentity,
    CacheReader,
    CacheWriter,
    begin_repair,
    end_repair,
    open_or_create,
    set_damaged_aside,
)

IDENTITY = CacheIdentity(
    base="base-1",
    tokenizer="tokenizer-1",
    template="alpaca",
    data="data-1",
    sequence_length=64,
    hidden_size=6,
    vocab_size=512,
    num_samples=40,
    dtype="bf16",
    precision="bf16",
)
WRITTEN_BY = {"tp_size": 1, "pp_size": 2}
FORK = multiprocessing.get_context("fork")


def valid_offsets(sample_id: int, sequence_length: int = IDENTITY.sequence_length) -> np.ndarray:
    """One in seven examples has none, one in three a scattered mask, the others one or two stretches."""
    if sample_id % 7 == 3:
        return np.zeros(0, dtype=np.int64)
    generator = np.random.default_rng(sample_id)
    mask = np.zeros(sequence_length, dtype=bool)
    if sample_id % 3 == 0:
        mask[generator.random(sequence_length) < 0.4] = True
    else:
        for _ in range(1 + sample_id % 2):
            start = int(generator.integers(0, sequence_length))
            mask[start : start + int(generator.integers(1, 20))] = True
    return np.flatnonzero(mask)


def hidden(ids: np.ndarray, offsets: np.ndarray, identity: CacheIdentity = IDENTITY) -> torch.Tensor:
    """Rows whose bytes are a hash of (sample id, offset, place in the row); any bit pattern occurs, NaN too."""
    place = np.arange(identity.row_bytes, dtype=np.uint64)
    key = np.asarray(ids).astype(np.uint64) * np.uint64(1_000_003) + np.asarray(offsets).astype(np.uint64)
    mixed = (key[:, None] * np.uint64(0x9E3779B97F4A7C15)) ^ (place * np.uint64(0xBF58476D1CE4E5B9))
    mixed *= np.uint64(0x94D049BB133111EB)
    raw = (mixed >> np.uint64(40)).astype(np.uint8)
    rows = torch.empty(len(raw), identity.hidden_size, dtype=identity.torch_dtype)
    rows.view(torch.uint8)[:] = torch.from_numpy(raw)
    return rows


def pairs(samples) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids and offsets of all valid tokens of the samples."""
    offsets = [valid_offsets(int(sample)) for sample in samples]
    ids = np.repeat(np.asarray(list(samples), dtype=np.int64), [part.size for part in offsets])
    return ids, np.concatenate([np.zeros(0, dtype=np.int64), *offsets])


def add(writer: CacheWriter, samples, identity: CacheIdentity = IDENTITY) -> None:
    for sample in samples:
        offsets = valid_offsets(sample)
        writer.add(sample, offsets, hidden(np.full(offsets.size, sample), offsets, identity))


def make(directory, samples, *, writer_id=0, identity: CacheIdentity = IDENTITY, shard_bytes=1200):
    """A cache with these samples, in several shards."""
    open_or_create(directory, identity, written_by=WRITTEN_BY)
    with CacheWriter(directory, writer_id, identity, shard_bytes=shard_bytes) as writer:
        add(writer, samples, identity)
    return directory


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def check_prefix(directory, identity: CacheIdentity = IDENTITY) -> set[int]:
    """Every stored sample is whole and every row right; returns the samples."""
    everything = range(identity.num_samples)
    with CacheReader(directory, identity) as reader:
        stored = sorted(set(everything) - set(reader.missing(list(everything))))
        ids, offsets = pairs(stored)
        assert same_bits(reader.read(ids, offsets), hidden(ids, offsets, identity))
        for sample in stored:
            assert np.array_equal(reader.offsets(sample), valid_offsets(sample))
        assert reader.num_samples == len(stored)
        assert reader.num_rows == ids.size
    return set(stored)


def shards(directory) -> list:
    return sorted(directory.glob("rows-*.safetensors"))


def leftovers(directory) -> list[str]:
    return [path.name for path in directory.iterdir() if "partial" in path.name]


def flip(path, position: int, bits: int = 1) -> None:
    with path.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ bits]))


def in_child(target, *args) -> int:
    """Runs a function in a forked child; returns its exit code (negative: the signal)."""
    child = FORK.Process(target=target, args=args)
    child.start()
    child.join(60)
    if child.exitcode is None:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        raise AssertionError("the child did not end")
    return child.exitcode


def other(**changes) -> CacheIdentity:
    return replace(IDENTITY, **changes)


def repair(directory, identity):
    """The whole repair on one process; `asft cache-reference --repair` shares its middle part out over the ranks."""
    plan = begin_repair(directory, identity)
    damaged = set_damaged_aside(directory, identity, plan.shards)
    return end_repair(directory, identity, plan, damaged, written_by=WRITTEN_BY)
