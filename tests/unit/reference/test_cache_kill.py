"""Writers killed by SIGKILL: at random moments, and before and inside every single call that changes the disk."""

import fcntl
import os
import random
import signal
import time

import pytest
from cache_cases import FORK, IDENTITY, WRITTEN_BY, add, check_prefix, in_child, leftovers, make

from asft_nemo.reference import cache_writer
from asft_nemo.reference.cache_store import CacheReader, CacheWriter, open_or_create, verify_cache

ALL = range(IDENTITY.num_samples)


def _write_missing(directory, rank, ranks, counter, shard_bytes=400):
    """What a job's rank does: finds what is missing, writes its share, and counts."""
    open_or_create(directory, IDENTITY, written_by=WRITTEN_BY)
    with CacheReader(directory, IDENTITY) as reader:
        missing = reader.missing([sample for sample in ALL if sample % ranks == rank])
    with CacheWriter(directory, rank, IDENTITY, shard_bytes=shard_bytes) as writer:
        for sample in missing:
            add(writer, [sample])
            counter.value += 1


def _kill_after(child, counter, count, extra_seconds):
    """Kills the child a moment after it has added so many examples; False where it had ended before."""
    deadline = time.monotonic() + 60
    while counter.value < count and child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.0002)
    time.sleep(extra_seconds)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def test_two_writers_killed_at_random_moments(tmp_path):
    """Caches, each written in three rounds by two writers that are killed; a round resumes what the one before left.

    Six or more: where a busy machine lets writers end before their kill comes, until at least 24 kills have been.
    """
    chance, kills = random.Random(0), 0
    for trial in range(60):
        if trial >= 6 and kills >= 24:
            break
        directory = tmp_path / str(trial)
        stored: set[int] = set()
        for ranks in (2, 3, 2):  # the share of a rank differs from round to round
            counters = [FORK.Value("i", 0, lock=False) for _ in range(2)]
            children = [
                FORK.Process(target=_write_missing, args=(directory, rank, ranks, counters[rank]))
                for rank in range(2)
            ]
            for child in children:
                child.start()
            for child, counter in zip(children, counters, strict=True):
                kills += _kill_after(child, counter, chance.randrange(0, 8), chance.random() * 0.003)
            if not (directory / "manifest.json").exists():
                continue  # killed before the cache was there
            now = check_prefix(directory)
            assert now >= stored
            stored = now
        _write_missing(directory, 0, 1, FORK.Value("i", 0, lock=False))
        assert check_prefix(directory) == set(ALL)
        assert verify_cache(directory, IDENTITY) == []
    assert kills >= 24


def _crash_at(directory, samples, call):
    """Dies in the call-th of the calls that change the disk: in the middle of a write, before any other."""
    made = 0

    def dying(name, real):
        def wrapped(*args, **kwargs):
            nonlocal made
            made += 1
            if made > call:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return wrapped

    for name in ("write", "fsync", "rename", "unlink", "close", "mkdir"):
        setattr(os, name, dying(name, getattr(os, name)))
    open_or_create(directory, IDENTITY, written_by=WRITTEN_BY)
    with CacheWriter(directory, 0, IDENTITY, shard_bytes=300) as writer:
        add(writer, samples)
    os._exit(0)


def test_killed_in_every_call_that_changes_the_disk(tmp_path):
    """Whatever the call, what is stored is whole and right, and the next writer completes it."""
    samples = [1, 2, 4, 5]
    for call in range(1000):
        directory = tmp_path / str(call)
        code = in_child(_crash_at, directory, samples, call)
        if (directory / "manifest.json").exists():
            stored = check_prefix(directory)
            assert stored <= set(samples)
            assert verify_cache(directory, IDENTITY) == []
        make(directory, samples)
        assert check_prefix(directory) == set(samples)
        assert not leftovers(directory)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert 25 < call < 1000


def test_a_shard_gets_its_name_after_all_is_synced(tmp_path, monkeypatch):
    """The order of the calls decides what a power cut can leave."""
    open_or_create(tmp_path, IDENTITY, written_by=WRITTEN_BY)
    calls: list[str] = []
    for name in ("write", "fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    with CacheWriter(tmp_path, 0, IDENTITY) as writer:
        add(writer, [1, 2])
    # Rows of both, index, header; the file, then its name, then the folder that holds the name.
    assert calls == ["write"] * 4 + ["fsync", "rename", "fsync"]


def _add_and_wait(directory, counter):
    writer = CacheWriter(directory, 0, IDENTITY)
    add(writer, [1, 2, 3])
    counter.value = 3
    time.sleep(60)


def test_the_next_writer_removes_what_a_killed_one_left_and_no_living_one_s(tmp_path):
    open_or_create(tmp_path, IDENTITY, written_by=WRITTEN_BY)
    counter = FORK.Value("i", 0, lock=False)
    child = FORK.Process(target=_add_and_wait, args=(tmp_path, counter))
    child.start()
    _kill_after(child, counter, 3, 0)
    living = CacheWriter(tmp_path, 1, IDENTITY)
    add(living, [1])
    assert len(leftovers(tmp_path)) == 2
    CacheWriter(tmp_path, 0, IDENTITY).close()
    CacheWriter(tmp_path, 1, IDENTITY).close()  # the same id as the living one
    assert len(leftovers(tmp_path)) == 1
    living.close()
    assert not leftovers(tmp_path)
    assert check_prefix(tmp_path) == {1}


@pytest.mark.parametrize("left_by", ["another machine", "a kernel that does not say who it is"])
def test_what_another_machine_may_still_write_stays_for_an_hour(tmp_path, monkeypatch, left_by):
    """There the file is not locked where a file system keeps locks to each machine."""
    name = tmp_path / "boot_id"
    if left_by == "another machine":
        name.write_text("0123abcd-0123-4567-89ab-0123456789ab\n")
    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "_BOOT_ID", name)
        patch.setattr(cache_writer.fcntl, "flock", lambda *_: None)
        open_or_create(tmp_path / "cache", IDENTITY, written_by=WRITTEN_BY)
        there = CacheWriter(tmp_path / "cache", 0, IDENTITY)
        add(there, [1, 2])
        if left_by != "another machine":
            CacheWriter(tmp_path / "cache", 0, IDENTITY).close()  # here, too, nobody knows
    CacheWriter(tmp_path / "cache", 0, IDENTITY).close()
    (left,) = leftovers(tmp_path / "cache")
    assert (".0123abcd.partial" in left) == (left_by == "another machine")
    there.close()
    assert check_prefix(tmp_path / "cache") == {1, 2}

    partial = tmp_path / "cache" / left
    partial.write_bytes(b"some rows")
    for seconds, stays in ((3500, True), (3600, False)):
        os.utime(partial, (time.time() - seconds,) * 2)
        CacheWriter(tmp_path / "cache", 0, IDENTITY).close()
        assert partial.exists() is stays


def test_a_partial_shard_is_locked_through_a_file_open_for_writing(tmp_path, monkeypatch):
    """NFS grants no exclusive lock through any other, and what killed writers left would stay for ever."""
    open_or_create(tmp_path, IDENTITY, written_by=WRITTEN_BY)
    here = cache_writer.this_machine()
    (tmp_path / f"rows-00000-000000-0123abcd.safetensors.{here}.partial").touch()
    real, modes = fcntl.flock, []

    def flock(descriptor, operation):
        modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        real(descriptor, operation)

    monkeypatch.setattr(cache_writer.fcntl, "flock", flock)
    CacheWriter(tmp_path, 0, IDENTITY).close()
    assert modes == [os.O_RDWR]
    assert not leftovers(tmp_path)
