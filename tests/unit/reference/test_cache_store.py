"""Round trips, keys, what is missing, identities, prefetching."""

import itertools
import json
import os
import threading
import time

import numpy as np
import pytest
import torch
from cache_cases import (
    FORK,
    IDENTITY,
    WRITTEN_BY,
    add,
    check_prefix,
    flip,
    hidden,
    leftovers,
    make,
    other,
    pairs,
    same_bits,
    shards,
    valid_offsets,
)
from safetensors import safe_open

from asft_nemo.errors import CacheError
from asft_nemo.reference import cache_prefetch
from asft_nemo.reference.cache_shard import HEADER_BYTES, encode_index, row_checksums, row_seeds
from asft_nemo.reference.cache_store import (
    CacheReader,
    CacheWriter,
    check_identity,
    open_or_create,
    read_manifest,
    require_space,
    verify_cache,
)

ALL = range(IDENTITY.num_samples)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
def test_rows_come_back_bit_for_bit(tmp_path, dtype):
    identity = other(dtype=dtype)
    make(tmp_path / "cache", ALL, identity=identity)
    assert check_prefix(tmp_path / "cache", identity) == set(ALL)
    assert verify_cache(tmp_path / "cache", identity) == []
    assert not leftovers(tmp_path / "cache")


def test_any_pairs_in_any_order(tmp_path):
    make(tmp_path, ALL)
    ids, offsets = pairs(ALL)
    generator = np.random.default_rng(0)
    with CacheReader(tmp_path, IDENTITY) as reader:
        for size in (0, 1, 2, 5, ids.size, 3 * ids.size):
            chosen = generator.integers(0, ids.size, size)  # repeated ones too
            found = reader.read(ids[chosen].tolist(), torch.from_numpy(offsets[chosen]))
            assert same_bits(found, hidden(ids[chosen], offsets[chosen]))
        out = torch.empty(ids.size, IDENTITY.hidden_size, dtype=torch.bfloat16)
        assert reader.read(ids, offsets, out=out) is out
        assert same_bits(out, hidden(ids, offsets))
        for wrong in (out.float(), out[:-1], torch.empty(6, ids.size, dtype=torch.bfloat16).T):
            with pytest.raises(ValueError, match="out must be"):
                reader.read(ids, offsets, out=wrong)


def test_several_writers_and_layouts_make_one_cache(tmp_path):
    open_or_create(tmp_path, IDENTITY, written_by=WRITTEN_BY)
    order = np.random.default_rng(1).permutation(IDENTITY.num_samples).tolist()
    writers = [CacheWriter(tmp_path, rank, IDENTITY, shard_bytes=300) for rank in range(3)]
    for sample, writer in zip(order, itertools.cycle(writers), strict=False):
        add(writer, [sample])
    for writer in writers:
        writer.close()
    assert check_prefix(tmp_path) == set(ALL)
    assert sum(writer.num_samples for writer in writers) == len(order)
    assert sum(writer.bytes for writer in writers) == pairs(ALL)[0].size * IDENTITY.row_bytes
    with CacheReader(tmp_path, IDENTITY) as reader:
        assert reader.bytes == sum(path.stat().st_size for path in shards(tmp_path))


def test_examples_without_valid_tokens_are_not_missing(tmp_path):
    make(tmp_path, [3, 10])
    assert valid_offsets(3).size == valid_offsets(10).size == 0
    with CacheReader(tmp_path, IDENTITY) as reader:
        assert reader.missing([3, 4, -1, 10, 5]) == [4, 5]
        assert reader.read([], []).shape == (0, IDENTITY.hidden_size)
        assert reader.offsets(3).size == 0


def test_an_empty_cache_lacks_everything(tmp_path):
    make(tmp_path, [])
    assert not shards(tmp_path)
    with CacheReader(tmp_path, IDENTITY) as reader:
        assert reader.missing(list(ALL)) == list(ALL)
        assert (reader.num_rows, reader.bytes) == (0, 0)
        with pytest.raises(
            CacheError, match=r"lacks 1 of the wanted samples .the first is 0.*asft cache-reference"
        ):
            reader.read([0], [0])


def test_of_an_example_stored_twice_the_first_shard_counts(tmp_path):
    make(tmp_path, [1, 2])
    with CacheWriter(tmp_path, 1, IDENTITY) as writer:
        offsets = valid_offsets(1)
        writer.add(1, offsets, torch.zeros(offsets.size, IDENTITY.hidden_size, dtype=torch.bfloat16))
        add(writer, [4])
    with CacheWriter(tmp_path, 0, IDENTITY) as writer:
        add(writer, [2, 5])
    assert check_prefix(tmp_path) == {1, 2, 4, 5}


def test_shards_end_at_a_size_an_age_and_a_flush(tmp_path):
    make(tmp_path / "size", ALL, shard_bytes=1000)
    largest = max(valid_offsets(sample).size for sample in ALL) * IDENTITY.row_bytes
    for path in shards(tmp_path / "size"):
        with safe_open(path, "pt") as stored:
            assert stored.get_tensor("rows").nbytes <= max(1000, largest)
    assert len(shards(tmp_path / "size")) >= pairs(ALL)[0].size * IDENTITY.row_bytes / 1000

    open_or_create(tmp_path / "age", IDENTITY, written_by=WRITTEN_BY)
    with CacheWriter(tmp_path / "age", 0, IDENTITY, shard_seconds=0) as writer:
        add(writer, [0, 1, 2])
        assert check_prefix(tmp_path / "age") == {0, 1}
        writer.flush()
        assert check_prefix(tmp_path / "age") == {0, 1, 2}
        writer.flush()  # nothing to finish
    assert len(shards(tmp_path / "age")) == 3


def test_a_shard_is_a_plain_safetensors_file(tmp_path):
    make(tmp_path, ALL, shard_bytes=10**9)
    (path,) = shards(tmp_path)
    ids, offsets = pairs(ALL)
    with safe_open(path, "pt") as stored:
        assert same_bits(stored.get_tensor("rows"), hidden(ids, offsets))
        assert stored.get_tensor("sample_ids").tolist() == list(ALL)
        assert json.loads(stored.metadata()["identity"])["base"] == IDENTITY.base


def test_a_part_of_an_example_is_read_without_the_rest(tmp_path):
    make(tmp_path, [1], shard_bytes=10**9)
    (path,) = shards(tmp_path)
    offsets = valid_offsets(1)
    spoiled = 4
    flip(path, HEADER_BYTES + spoiled * IDENTITY.row_bytes + 3)
    with CacheReader(tmp_path, IDENTITY) as reader:
        rest = np.delete(offsets, spoiled)
        ids = np.full(rest.size, 1)
        assert same_bits(reader.read(ids, rest), hidden(ids, rest))
        with pytest.raises(
            CacheError, match=rf"{path.name}.*sample 1, token offset {offsets[spoiled]} .*--repair"
        ):
            reader.read([1], [offsets[spoiled]])


def test_what_is_not_stored_is_named(tmp_path):
    make(tmp_path, [1, 2])
    absent = next(offset for offset in range(64) if offset not in valid_offsets(2))
    with CacheReader(tmp_path, IDENTITY) as reader:
        for offset in (absent, -1, 64, 10**6):
            with pytest.raises(
                CacheError, match=f"sample 2 without token offset {offset}: .*reference.cache_dir"
            ):
                reader.read([1, 2], [valid_offsets(1)[0], offset])
        for sample in (0, 3, 99, -1):
            with pytest.raises(CacheError, match=f"the first is {sample}"):
                reader.read([sample], [0])
            with pytest.raises(CacheError, match=f"the first is {sample}"):
                reader.offsets(sample)
        with pytest.raises(ValueError, match="2 sample ids and 1 token offsets"):
            reader.read([1, 2], [0])


@pytest.mark.parametrize(
    ("sample_id", "offsets", "shape", "dtype", "message"),
    [
        (0, [1, 2], (2, 7), torch.bfloat16, r"\[2, 7\], expected torch.bfloat16 \[2, 6\]"),
        (0, [1, 2], (3, 6), torch.bfloat16, r"\[3, 6\], expected"),
        (0, [1, 2], (2, 6), torch.float32, "torch.float32"),
        (0, [2, 1], (2, 6), torch.bfloat16, "increase strictly"),
        (0, [2, 2], (2, 6), torch.bfloat16, "increase strictly"),
        (0, [-1, 2], (2, 6), torch.bfloat16, "increase strictly"),
        (0, [2, 64], (2, 6), torch.bfloat16, "less than 64"),
        (0, [0.5, 1.5], (2, 6), torch.bfloat16, "whole numbers"),
        (-1, [1, 2], (2, 6), torch.bfloat16, "negative"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, sample_id, offsets, shape, dtype, message):
    open_or_create(tmp_path, IDENTITY, written_by=WRITTEN_BY)
    with CacheWriter(tmp_path, 0, IDENTITY) as writer:
        add(writer, [1])
        with pytest.raises(ValueError, match=message):
            writer.add(sample_id, offsets, torch.zeros(shape, dtype=dtype))
        add(writer, [2])
    assert check_prefix(tmp_path) == {1, 2}
    with pytest.raises(ValueError, match="closed"):
        add(writer, [4])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base", "base-2"),
        ("tokenizer", "tokenizer-2"),
        ("template", "chat"),
        ("data", "data-2"),
        ("sequence_length", 128),
        ("hidden_size", 8),
        ("vocab_size", 1024),
        ("num_samples", 41),
        ("dtype", "fp32"),
        ("precision", "fp8_current"),
    ],
)
def test_another_identity_is_refused_by_the_field_that_differs(tmp_path, field, value):
    make(tmp_path, [1])
    before = sorted(os.listdir(tmp_path))
    here = other(**{field: value})
    for attempt in (
        lambda: open_or_create(tmp_path, here, written_by={}),
        lambda: check_identity(tmp_path, here),
        lambda: CacheWriter(tmp_path, 0, here),
        lambda: CacheReader(tmp_path, here),
        lambda: verify_cache(tmp_path, here),
    ):
        with pytest.raises(CacheError) as caught:
            attempt()
        said = f"{field} ({getattr(IDENTITY, field)!r} in the cache, {value!r} in this run)"
        assert said in str(caught.value)
        assert str(caught.value).count("in this run") == 1
        assert "set another reference.cache_dir, or remove this one" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_shard_of_another_cache_is_refused(tmp_path):
    make(tmp_path / "a", [1])
    make(tmp_path / "b", [2], identity=other(base="base-2"))
    (path,) = shards(tmp_path / "b")
    path.rename(tmp_path / "a" / path.name)
    with pytest.raises(CacheError, match=r"belongs to another cache: base \('base-2' in the cache"):
        CacheReader(tmp_path / "a", IDENTITY)


def test_the_manifest_says_who_wrote(tmp_path):
    make(tmp_path, [], identity=IDENTITY)
    open_or_create(tmp_path, IDENTITY, written_by={"tp_size": 8})
    manifest = read_manifest(tmp_path)
    assert manifest["written_by"] == WRITTEN_BY
    assert manifest["format"] == 1
    assert manifest["identity"]["vocab_size"] == 512


def test_another_format_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("asft_nemo.reference.cache_manifest.FORMAT_VERSION", 2)
    open_or_create(tmp_path, IDENTITY, written_by=WRITTEN_BY)
    monkeypatch.undo()
    with pytest.raises(CacheError, match="format 2 where this version reads 1"):
        open_or_create(tmp_path, IDENTITY, written_by=WRITTEN_BY)


def test_folders_that_are_no_cache(tmp_path):
    with pytest.raises(CacheError, match=r"holds no cache .*asft cache-reference"):
        CacheReader(tmp_path / "absent", IDENTITY)
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot be written .*another reference.cache_dir"):
        open_or_create(tmp_path / "file", IDENTITY, written_by=WRITTEN_BY)
    with pytest.raises(CacheError, match="holds no cache"):
        CacheReader(tmp_path / "file", IDENTITY)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(CacheError, match=r"not empty and holds no cache .found metrics.jsonl"):
        open_or_create(tmp_path / "run", IDENTITY, written_by=WRITTEN_BY)
    make(tmp_path / "cache", [1])
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"manifest.json is missing: .*--repair"):
        open_or_create(tmp_path / "cache", IDENTITY, written_by=WRITTEN_BY)


def _fill_from(directory, rank, barrier):
    barrier.wait(20)
    open_or_create(directory, IDENTITY, written_by={"rank": rank})
    with CacheWriter(directory, rank, IDENTITY, shard_bytes=300) as writer:
        add(writer, range(rank, IDENTITY.num_samples, 4))


def test_four_processes_create_and_fill_one_cache(tmp_path):
    barrier = FORK.Barrier(4)
    children = [
        FORK.Process(target=_fill_from, args=(tmp_path / "new" / "cache", r, barrier)) for r in range(4)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert check_prefix(tmp_path / "new" / "cache") == set(ALL)


def test_two_writers_with_one_id_harm_nothing(tmp_path):
    open_or_create(tmp_path, IDENTITY, written_by=WRITTEN_BY)
    first = CacheWriter(tmp_path, 0, IDENTITY)
    add(first, [1, 2])
    second = CacheWriter(tmp_path, 0, IDENTITY)
    add(second, [2, 4])
    second.close()
    first.close()
    assert check_prefix(tmp_path) == {1, 2, 4}


def test_what_was_added_before_an_error_elsewhere_is_kept(tmp_path):
    open_or_create(tmp_path, IDENTITY, written_by=WRITTEN_BY)

    def run():
        with CacheWriter(tmp_path, 0, IDENTITY) as writer:
            add(writer, [1, 2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert check_prefix(tmp_path) == {1, 2}


def test_too_small_a_disk_is_said_before_the_work(tmp_path):
    identity = other(hidden_size=8192)
    require_space(tmp_path, identity, rows=1000)
    with pytest.raises(CacheError, match=r"needs 1.64e\+07 GB more where .* GB are free: make room"):
        require_space(tmp_path, identity, rows=10**12)
    with pytest.raises(CacheError, match="No such file"):
        require_space(tmp_path / "absent", identity, rows=1)


def test_an_index_of_a_hundred_thousand_examples_and_sixty_million_tokens(tmp_path):
    """The rows are a hole in the file, but for one that is written where it belongs."""
    samples, each = 100_000, 600
    identity = other(sequence_length=1024, hidden_size=64, num_samples=samples)
    open_or_create(tmp_path, identity, written_by=WRITTEN_BY)
    ids = np.random.default_rng(0).permutation(samples).astype(np.int64)
    ones = np.ones(samples, dtype=np.int64)
    columns = {
        "sample_ids": ids,
        "row_counts": ones * each,
        "run_counts": ones,
        "run_starts": ids % 400,
        "run_lengths": ones * each,
    }
    header, index = encode_index(identity, columns, num_rows=samples * each)
    at, offset = 77_777, 123
    sample = int(ids[at])
    row = at * each + offset
    wanted = hidden(np.asarray([sample]), np.asarray([sample % 400 + offset]), identity)
    crc = row_checksums(
        wanted.view(torch.uint8).numpy(), row_seeds(ids[at : at + 1], ids[at : at + 1] % 400 + offset)
    )
    rows_end = HEADER_BYTES + samples * each * identity.row_bytes
    with (tmp_path / "rows-00000-000000-00000000.safetensors").open("wb") as stream:
        stream.write(header)
        stream.seek(HEADER_BYTES + row * identity.row_bytes)
        stream.write(wanted.view(torch.uint8).numpy().tobytes())
        stream.seek(rows_end)
        stream.write(index)
        stream.seek(4 * row, os.SEEK_CUR)
        stream.write(crc.tobytes())
        stream.truncate(rows_end + len(index) + 4 * samples * each)
    started = time.process_time()  # other work on the machine must not decide
    with CacheReader(tmp_path, identity) as reader:
        assert not reader.missing(ids)
        assert (reader.num_samples, reader.num_rows) == (samples, samples * each)
        assert same_bits(reader.read([sample], [sample % 400 + offset]), wanted)
    assert time.process_time() - started < 10  # 0.1 s on an idle machine


def _prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "cache prefetch"]


def test_prefetching_reads_ahead_and_changes_nothing(tmp_path):
    make(tmp_path, ALL)
    with CacheReader(tmp_path, IDENTITY) as reader:
        assert not _prefetch_threads()
        for start in range(0, len(ALL), 8):
            batch = ALL[start : start + 8]
            reader.prefetch([*batch, 10**6, -1])  # a hint: what is not stored is passed over
            ids, offsets = pairs(batch)
            assert same_bits(reader.read(ids, offsets), hidden(ids, offsets))
        assert reader.wait_prefetched(30)
        ids, offsets = pairs(ALL)
        assert reader.prefetched_bytes == ids.size * IDENTITY.row_bytes
        reader.prefetch(ids[:5], offsets[:5])
        reader.prefetch([2, 2], [0, 10**6])  # offsets that are not stored: nothing
        assert reader.wait_prefetched(30)
        assert reader.prefetched_bytes == (ids.size + 5) * IDENTITY.row_bytes
        assert len(_prefetch_threads()) == 1
        for path in shards(tmp_path):
            path.unlink()
        reader.prefetch(ALL)  # files that are gone: nothing, here
        assert reader.wait_prefetched(30)
        with pytest.raises(CacheError, match="is gone"):
            reader.read(ids, offsets)
    assert not _prefetch_threads()


def test_what_waits_for_the_prefetch_thread_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))
    go, real = threading.Event(), os.preadv
    monkeypatch.setattr(cache_prefetch.os, "preadv", lambda *args: go.wait(30) and real(*args))
    prefetcher = cache_prefetch.Prefetcher(max_bytes=2000)
    for start in range(0, 10_000, 500):
        prefetcher.ask([(path, start, 500)])
    assert not prefetcher.wait(0)
    go.set()
    assert prefetcher.wait(30)
    # The one being read when the others came, and the last four.
    assert prefetcher.bytes_read in (2000, 2500)
    before = prefetcher.bytes_read
    prefetcher.ask(
        [(path, start, 500) for start in range(0, 10_000, 500)]
    )  # the first of one call, not the last
    assert prefetcher.wait(30)
    assert prefetcher.bytes_read == before + 2000
    prefetcher.ask([(path, 9_000, 2_000)])  # beyond the end
    assert prefetcher.wait(30)
    prefetcher.close()
    prefetcher.close()
    with pytest.raises(ValueError, match="closed"):
        prefetcher.ask([(path, 0, 1)])


def test_closing_does_not_wait_for_what_is_queued(tmp_path):
    make(tmp_path, ALL)
    reader = CacheReader(tmp_path, IDENTITY)
    reader.prefetch(ALL)
    reader.close()
    assert not _prefetch_threads()
