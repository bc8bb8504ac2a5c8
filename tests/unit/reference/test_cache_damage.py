"""Changed bytes, cut files, full and read-only disks: noticed and named, and repaired by computing only what is lost."""

import errno
import os
import random
import resource
import signal

import numpy as np
import pytest
from cache_cases import (
    IDENTITY,
    WRITTEN_BY,
    add,
    check_prefix,
    flip,
    hidden,
    in_child,
    leftovers,
    make,
    other,
    pairs,
    repair,
    same_bits,
    shards,
)
from safetensors import safe_open

from asft_nemo.errors import CacheError
from asft_nemo.reference import cache_writer
from asft_nemo.reference.cache_shard import HEADER_BYTES
from asft_nemo.reference.cache_store import (
    CacheReader,
    CacheWriter,
    DamagedShard,
    open_or_create,
    verify_cache,
)

ALL = range(IDENTITY.num_samples)


def _read_all(directory, samples):
    ids, offsets = pairs(samples)
    with CacheReader(directory, IDENTITY) as reader:
        assert not reader.missing(list(samples))
        assert same_bits(reader.read(ids, offsets), hidden(ids, offsets))


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.long)])
def test_any_flipped_byte_of_a_shard_is_noticed(tmp_path, step):
    """Every byte (or a seventh of them) of header, index, rows and checksums, but for a share of the header's padding."""
    make(tmp_path, [1], shard_bytes=10**9)
    (path,) = shards(tmp_path)
    _read_all(tmp_path, [1])
    size = path.stat().st_size
    text = path.read_bytes()[8:HEADER_BYTES].rstrip()
    padding = range(8 + len(text) + 2, HEADER_BYTES - 2)
    chance = random.Random(0)
    positions = sorted({*range(size)} - {*padding} | {*chance.sample(padding, 50)})
    assert len(positions) > 1000
    for position in positions[::step]:
        bits = chance.choice([1 << chance.randrange(8), chance.randrange(1, 256)])
        flip(path, position, bits)
        with pytest.raises(DamagedShard) as caught:
            _read_all(tmp_path, [1])
        assert str(path) in str(caught.value)
        assert "run `asft cache-reference` with --repair" in str(caught.value)
        flip(path, position, bits)
    _read_all(tmp_path, [1])


@pytest.mark.parametrize("bits", [0x01, 0x20, 0x2A])
def test_any_flipped_byte_of_the_manifest_is_noticed(tmp_path, bits):
    """Bits 0x2A turn a space into a line feed, which JSON would not mind."""
    make(tmp_path, [1])
    path = tmp_path / "manifest.json"
    for position in range(path.stat().st_size):
        flip(path, position, bits)
        with pytest.raises(CacheError, match=r"manifest.json is damaged or was edited: .*--repair"):
            CacheReader(tmp_path, IDENTITY)
        flip(path, position, bits)
    _read_all(tmp_path, [1])


def test_a_cut_or_longer_shard_is_noticed(tmp_path):
    make(tmp_path, [1, 2, 3], shard_bytes=10**9)
    (path,) = shards(tmp_path)
    whole = path.read_bytes()
    rows_end = HEADER_BYTES + pairs([1, 2, 3])[0].size * IDENTITY.row_bytes
    for length in (0, 1, 7, 8, 9, 100, HEADER_BYTES - 1, HEADER_BYTES, rows_end, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedShard, match=str(path)):
            CacheReader(tmp_path, IDENTITY)
        assert [shard.path for shard in verify_cache(tmp_path, IDENTITY)] == [path]
    for more in (b"\0", whole):
        path.write_bytes(whole + more)
        with pytest.raises(DamagedShard, match=f"{len(whole) + len(more)} bytes where its header says"):
            CacheReader(tmp_path, IDENTITY)


def test_a_shard_cut_while_it_is_mapped_does_not_kill_the_reader(tmp_path):
    make(tmp_path, [1, 2], shard_bytes=10**9)
    (path,) = shards(tmp_path)
    ids, offsets = pairs([1, 2])
    with CacheReader(tmp_path, IDENTITY) as reader:
        reader.read(ids, offsets)
        os.truncate(path, HEADER_BYTES)
        with pytest.raises(DamagedShard, match="it has 4096 bytes where it had"):
            reader.read(ids, offsets)
    make(tmp_path / "other", [1], shard_bytes=10**9)
    with CacheReader(tmp_path / "other", IDENTITY) as reader:
        os.truncate(shards(tmp_path / "other")[0], 0)
        with pytest.raises(DamagedShard, match="it has 0 bytes where it had"):
            reader.read(*pairs([1]))


def test_rows_exchanged_between_tokens_are_noticed(tmp_path):
    """Each row's checksum is right for its bytes, but they are another token's."""
    make(tmp_path, [1], shard_bytes=10**9)
    (path,) = shards(tmp_path)
    raw = bytearray(path.read_bytes())
    count = pairs([1])[0].size
    for start, size in ((HEADER_BYTES, IDENTITY.row_bytes), (len(raw) - 4 * count, 4)):
        first, second = raw[start : start + size], raw[start + size : start + 2 * size]
        raw[start : start + 2 * size] = second + first
    path.write_bytes(raw)
    with pytest.raises(DamagedShard, match="checksum of sample 1"):
        _read_all(tmp_path, [1])


def test_repair_sets_aside_what_is_damaged_and_only_that_is_lost(tmp_path):
    make(tmp_path, ALL)
    assert len(shards(tmp_path)) > 5
    held = {}
    for path in shards(tmp_path):
        with safe_open(path, "np") as stored:
            held[path] = set(stored.get_tensor("sample_ids").tolist())
    in_rows, in_index, cut = shards(tmp_path)[1], shards(tmp_path)[2], shards(tmp_path)[4]
    flip(in_rows, HEADER_BYTES + 5)
    flip(in_index, in_index.stat().st_size - 4 * 60)
    os.truncate(cut, cut.stat().st_size - 1)
    partial = tmp_path / "rows-00003-000000-0123abcd.safetensors.partial"
    partial.write_bytes(b"a killed writer's on another machine")
    an_hour_ago = partial.stat().st_mtime - 3600
    os.utime(partial, (an_hour_ago, an_hour_ago))

    seen = []
    damaged = verify_cache(tmp_path, IDENTITY, progress=lambda *now: seen.append(now))
    assert [shard.path for shard in damaged] == [in_rows, in_index, cut]
    assert [name for _, _, name in seen] == [path.name for path in held]
    assert seen[-1][0] == seen[-1][1] == sum(path.stat().st_size for path in held)

    report = repair(tmp_path, IDENTITY)
    assert [shard.path for shard in report.damaged] == [in_rows, in_index, cut]
    assert (report.manifest_rewritten, report.partial_shards_removed) == (False, 1)
    lost = held[in_rows] | held[in_index] | held[cut]
    assert check_prefix(tmp_path) == set(ALL) - lost
    assert repair(tmp_path, IDENTITY).damaged == ()
    with CacheReader(tmp_path, IDENTITY) as reader, CacheWriter(tmp_path, 0, IDENTITY) as writer:
        missing = reader.missing(list(ALL))
        assert set(missing) == lost
        add(writer, missing)
    assert check_prefix(tmp_path) == set(ALL)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_repair_writes_the_manifest_again(tmp_path, how):
    make(tmp_path, [1, 2])
    manifest = tmp_path / "manifest.json"
    whole = manifest.read_bytes()
    flip(manifest, 20) if how == "damaged" else manifest.unlink()
    # Under other settings the rows would be another cache's: nothing is touched.
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CacheError, match=r"belongs to another cache: tokenizer \('tokenizer-1' in the cache"):
        repair(tmp_path, other(tokenizer="tokenizer-2"))
    assert sorted(os.listdir(tmp_path)) == before
    assert repair(tmp_path, IDENTITY).manifest_rewritten
    assert manifest.read_bytes() == whole
    assert check_prefix(tmp_path) == {1, 2}


def test_repair_refuses_what_is_no_cache_or_another(tmp_path):
    make(tmp_path / "cache", [1])
    (tmp_path / "empty").mkdir()
    flip(shards(tmp_path / "cache")[0], HEADER_BYTES)
    with pytest.raises(CacheError, match="written for another run: base"):
        repair(tmp_path / "cache", other(base="base-2"))
    assert len(shards(tmp_path / "cache")) == 1
    for name in ("empty", "absent"):
        with pytest.raises(CacheError, match="holds no cache"):
            repair(tmp_path / name, IDENTITY)


def test_a_foreign_shard_is_set_aside_by_repair(tmp_path):
    make(tmp_path / "a", [1])
    make(tmp_path / "b", [2], identity=other(base="base-2"))
    (path,) = shards(tmp_path / "b")
    path.rename(tmp_path / "a" / path.name)
    assert len(repair(tmp_path / "a", IDENTITY).damaged) == 1
    assert check_prefix(tmp_path / "a") == {1}


@pytest.mark.parametrize(("name", "call"), [("write", 1), ("write", 9), ("fsync", 2), ("rename", 2)])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_loses_the_open_shard_only(tmp_path, monkeypatch, name, call, code):
    open_or_create(tmp_path, IDENTITY, written_by=WRITTEN_BY)
    real, calls = getattr(os, name), []

    def full(*args):
        calls.append(args)
        if len(calls) >= call:
            raise OSError(code, os.strerror(code))
        return real(*args)

    writer = CacheWriter(tmp_path, 0, IDENTITY, shard_bytes=300)
    monkeypatch.setattr(cache_writer.os, name, full)
    with pytest.raises(CacheError) as caught:
        add(writer, [*ALL, *ALL])
    assert f"the disk of {tmp_path} is full" in str(caught.value)
    assert "goes on from the finished shards, or set reference.cache_dir to another disk" in str(caught.value)
    monkeypatch.undo()
    writer.close()
    assert not leftovers(tmp_path)
    stored = check_prefix(tmp_path)
    with CacheWriter(tmp_path, 0, IDENTITY) as writer:
        add(writer, sorted(set(ALL) - stored))
    assert check_prefix(tmp_path) == set(ALL)


def _fill_under_a_limit(directory):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER_BYTES + 600, resource.RLIM_INFINITY))
    writer = CacheWriter(directory, 0, IDENTITY, shard_bytes=10**9)
    add(writer, [1])
    writer.flush()
    try:
        add(writer, ALL)
    except CacheError as error:
        os._exit(0 if "is full (File too large)" in str(error) else 3)
    os._exit(4)


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path):
    """The operating system itself refuses in the middle of a write."""
    open_or_create(tmp_path, IDENTITY, written_by=WRITTEN_BY)
    assert in_child(_fill_under_a_limit, tmp_path) == 0
    assert not leftovers(tmp_path)
    assert check_prefix(tmp_path) == {1}


def _use_as_nobody(directory, action):
    os.chdir(directory)  # pytest's own folders are closed to others, but the working folder stays reachable
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    try:
        action()
    except CacheError as error:
        os._exit(0 if "cannot be written (Permission denied): make the folder writable" in str(error) else 3)
    os._exit(4)


@pytest.mark.parametrize(
    "action",
    [
        lambda: open_or_create("new", IDENTITY, written_by=WRITTEN_BY),
        lambda: open_or_create("empty", IDENTITY, written_by=WRITTEN_BY),
        lambda: add(CacheWriter("cache", 0, IDENTITY), [2]),
    ],
    ids=["new folder", "manifest", "shard"],
)
def test_a_folder_that_is_not_writable(tmp_path, action):
    make(tmp_path / "cache", [1])
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "cache", tmp_path / "empty", tmp_path):
        folder.chmod(0o555)
    before = sorted(tmp_path.rglob("*"))
    try:
        assert in_child(_use_as_nobody, tmp_path, action) == 0
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        for folder in (tmp_path, tmp_path / "cache", tmp_path / "empty"):
            folder.chmod(0o755)


def _read_as_nobody(directory):
    os.chdir(directory)
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    _read_all("cache", [1])
    open_or_create("cache", IDENTITY, written_by={})
    os._exit(0 if verify_cache("cache", IDENTITY) == [] else 3)


def test_reading_needs_no_right_to_write(tmp_path):
    make(tmp_path / "cache", [1])
    tmp_path.chmod(0o755)
    (tmp_path / "cache").chmod(0o555)
    try:
        assert in_child(_read_as_nobody, tmp_path) == 0
    finally:
        (tmp_path / "cache").chmod(0o755)


def test_seeds_differ_between_neighbours():
    from asft_nemo.reference.cache_shard import row_seeds

    ids, offsets = np.meshgrid(np.arange(2000), np.arange(500))
    seeds = row_seeds(ids.reshape(-1).astype(np.int64), offsets.reshape(-1).astype(np.int64))
    # A million keys into 2^32 seeds: 116 pairs would meet by chance.
    assert seeds.size - np.unique(seeds).size < 1000
    assert np.unique(seeds[ids.reshape(-1) == 7]).size == 500
