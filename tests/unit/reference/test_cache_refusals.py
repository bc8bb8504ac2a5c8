"""What the system refuses to a healthy cache: too few open files, a file server's hiccup. Nothing of it is damage."""

import errno
import gc
import io
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from cache_cases import (
    IDENTITY,
    WRITTEN_BY,
    add,
    check_prefix,
    flip,
    hidden,
    in_child,
    make,
    pairs,
    repair,
    same_bits,
    shards,
)

from asft_nemo.errors import CacheError
from asft_nemo.reference import cache_reader, cache_shard, cache_writer
from asft_nemo.reference.cache_store import (
    CacheReader,
    CacheWriter,
    DamagedShard,
    open_or_create,
    verify_cache,
)

ALL = range(IDENTITY.num_samples)


def _mapped(directory):
    """Shards that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(directory) in line for line in lines)


def _read_with_few_files(directory):
    """Every example by itself and all at once, twice, in other orders; exit code 0 where every row is right."""
    cache_reader.MAPPED_SHARDS = 8
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 16, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    ids, offsets = pairs(ALL)
    with CacheReader(directory, IDENTITY) as reader:
        for order in (slice(None), slice(None, None, -1)):
            for sample in ALL[order]:
                assert same_bits(reader.read(*pairs([sample])), hidden(*pairs([sample])))
            assert same_bits(reader.read(ids[order], offsets[order]), hidden(ids[order], offsets[order]))
            assert 1 < _mapped(directory) <= 8
    os._exit(0)


def test_a_cache_of_more_shards_than_a_process_may_open_is_read(tmp_path):
    make(tmp_path, ALL, shard_bytes=1)
    assert len(shards(tmp_path)) > 30
    assert in_child(_read_with_few_files, tmp_path) == 0


def test_rows_of_a_shard_outlive_its_place_among_the_mapped_ones(tmp_path, monkeypatch):
    """Who still looks at a file's rows keeps it mapped; then it is unmapped."""
    monkeypatch.setattr(cache_reader, "MAPPED_SHARDS", 1)
    make(tmp_path, [1, 2], shard_bytes=1)
    with CacheReader(tmp_path, IDENTITY) as reader:
        reader.read(*pairs([1]))
        rows = next(iter(reader._maps.values())).rows
        reader.read(*pairs([2]))
        assert _mapped(tmp_path) == 2
        assert same_bits(torch.from_numpy(rows.copy()), hidden(*pairs([1])).view(torch.uint8))
        del rows
        gc.collect()
        assert _mapped(tmp_path) == 1


REFUSALS = {
    errno.EIO: "look after that disk or mount",
    errno.ESTALE: "look after that disk or mount",
    errno.EACCES: "give read permission",
    errno.EMFILE: r"raise the limit of open files \(ulimit -n\)",
    errno.ENFILE: r"raise the limit of open files \(ulimit -n\)",
}


def _refuse(monkeypatch, path, code, *, call):
    """From the call-th time on, the file cannot be opened."""
    real, calls = io.open, []

    def opened(file, *args, **kwargs):
        if str(file) == str(path):
            calls.append(file)
            if len(calls) >= call:
                raise OSError(code, os.strerror(code), str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", opened)  # what Path.open calls


@pytest.mark.parametrize("code", REFUSALS)
def test_a_file_that_the_system_does_not_hand_out_is_not_damaged(tmp_path, monkeypatch, code):
    """When its index is read, its rows are mapped, its size is asked for, and in a repair: once it is handed out again, all is there."""
    make(tmp_path, [1, 2, 4], shard_bytes=1)
    path = shards(tmp_path)[1]
    before = sorted(os.listdir(tmp_path))
    said = (
        rf"^{path} cannot be read \({os.strerror(code)}\), which says nothing of its rows: {REFUSALS[code]}"
    )

    def refused(action, *, call=1):
        with monkeypatch.context() as patch:
            _refuse(patch, path, code, call=call)
            with pytest.raises(CacheError, match=said) as caught:
                action()
        assert not isinstance(caught.value, DamagedShard)
        assert "--repair" not in str(caught.value)
        assert sorted(os.listdir(tmp_path)) == before

    refused(lambda: CacheReader(tmp_path, IDENTITY))
    for call in (1, 2):  # its header, its rows
        refused(lambda: verify_cache(tmp_path, IDENTITY), call=call)
        refused(lambda: repair(tmp_path, IDENTITY), call=call)
    with CacheReader(tmp_path, IDENTITY) as reader:
        refused(lambda: reader.read(*pairs([1, 2, 4])))
        assert same_bits(reader.read(*pairs([1, 2, 4])), hidden(*pairs([1, 2, 4])))
    assert repair(tmp_path, IDENTITY).damaged == ()
    assert check_prefix(tmp_path) == {1, 2, 4}


def test_a_mapped_file_whose_size_is_not_said_is_not_damaged(tmp_path, monkeypatch):
    make(tmp_path, [1])
    with CacheReader(tmp_path, IDENTITY) as reader:
        reader.read(*pairs([1]))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", _stale)
            with pytest.raises(cache_shard.UnreadableShard, match="Stale file"):
                reader.read(*pairs([1]))
        assert same_bits(reader.read(*pairs([1])), hidden(*pairs([1])))


def _stale(path, **_):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))


def test_what_is_no_file_is_damaged(tmp_path):
    """A folder of a shard's name is set aside, as a shard that is gone is lost."""
    make(tmp_path, [1])
    folder = shards(tmp_path)[0].with_name("rows-00009-000000-0123abcd.safetensors")
    folder.mkdir()
    (found,) = repair(tmp_path, IDENTITY).damaged
    assert (found.path, found.reason) == (folder, "it is no file: Is a directory")
    assert check_prefix(tmp_path) == {1}


def test_a_folder_that_cannot_be_synced_closes_no_other_file(tmp_path, monkeypatch):
    """The shard is closed by then, and its descriptor's number is given to the next file that anybody opens."""
    open_or_create(tmp_path, IDENTITY, written_by=WRITTEN_BY)
    writer = CacheWriter(tmp_path, 0, IDENTITY)
    add(writer, [1])
    others = []

    def refuse(directory):
        others.append(os.open(os.devnull, os.O_RDONLY))
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "sync_directory", refuse)
        with pytest.raises(CacheError, match="Input/output error"):
            writer.flush()
    os.fstat(others[0])
    os.close(others[0])
    writer.close()
    assert check_prefix(tmp_path) == {1}


def test_a_repair_that_is_interrupted_keeps_what_it_did(tmp_path, monkeypatch):
    make(tmp_path, [1, 2, 4], shard_bytes=1)
    first, last = shards(tmp_path)[0], shards(tmp_path)[2]
    flip(first, cache_shard.HEADER_BYTES)
    with monkeypatch.context() as patch:
        _refuse(patch, last, errno.EIO, call=1)
        with pytest.raises(CacheError, match=f"^{last} cannot be read"):
            repair(tmp_path, IDENTITY)
    assert first.with_name(first.name + ".damaged").is_file()
    assert repair(tmp_path, IDENTITY).damaged == ()
    assert check_prefix(tmp_path) == {2, 4}


@pytest.mark.parametrize("kind", [DamagedShard, cache_shard.ForeignShard])
def test_what_one_rank_finds_can_be_told_to_another(kind):
    told = pickle.loads(pickle.dumps(kind(Path("/cache/rows"), "it is gone")))
    assert type(told) is kind
    assert (told.path, told.reason) == (Path("/cache/rows"), "it is gone")
    assert str(told) == str(kind(Path("/cache/rows"), "it is gone"))
