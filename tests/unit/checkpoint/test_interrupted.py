"""Conversions that are killed, interrupted or run out of room: what is there afterwards is whole, and the next start uses it."""

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
from hf_cases import write_hf

from asft_nemo.checkpoint import convert, journal, shards
from asft_nemo.checkpoint.convert import export_hf, import_hf
from asft_nemo.checkpoint.journal import JOURNAL_NAME, Journal
from asft_nemo.checkpoint.staging import resumable_directory
from asft_nemo.checkpoint.verify import verify
from asft_nemo.errors import CheckpointError

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Hugging Face checkpoint and its NeMo form."""
    folder = tmp_path_factory.mktemp("source")
    write_hf(folder / "hf", files=2)
    import_hf(folder / "hf", folder / "nemo")
    return folder


def _convert(source, target, direction, progress=None):
    if direction == "import":
        import_hf(source / "hf", target, progress=progress)
    else:
        export_hf(source / "nemo", target, max_shard_bytes=6_000, progress=progress)


def _same(source, target, direction):
    pair = (target, source / "hf") if direction == "import" else (source / "nemo", target)
    assert verify(*pair).identical
    assert JOURNAL_NAME not in os.listdir(target)
    assert not (target.parent / f".{target.name}.partial").exists()


def _convert_and_count(source, target, direction, counter):
    def progress(done, total, what):
        counter.value += 1
        time.sleep(0.001)

    _convert(source, target, direction, progress)


@pytest.mark.parametrize("direction", ["import", "export"])
def test_killed_at_random_moments(source, tmp_path, direction, monkeypatch):
    """At least 20 kills: the target is absent or right, and what is started again ends right, with fewer blocks to do than before."""
    monkeypatch.setattr(convert, "BLOCK_BYTES", 1_500)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 1_500)
    chance, kills, resumed = random.Random(direction), 0, 0
    for trial in range(40):
        if kills >= 20:
            break
        target = tmp_path / str(trial)
        for _ in range(2):
            counter = FORK.Value("i", 0, lock=False)
            child = FORK.Process(target=_convert_and_count, args=(source, target, direction, counter))
            child.start()
            wanted, deadline = chance.randrange(0, 60), time.monotonic() + 30
            while counter.value < wanted and child.is_alive() and time.monotonic() < deadline:
                time.sleep(0.0005)
            child.kill()
            child.join()
            kills += child.exitcode == -signal.SIGKILL
            assert child.exitcode in (0, -signal.SIGKILL)
            if target.exists():
                _same(source, target, direction)
                break
        if not target.exists():
            said = []
            _convert(
                source,
                target,
                direction,
                lambda done, total, what, said=said: said.append((done, total, what)),
            )
            resumed += any(what == "complete before" for _, _, what in said)
            assert said[-1][0] == said[-1][1]
            _same(source, target, direction)
    assert kills >= 20
    assert resumed >= 5


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_full_disk_keeps_what_is_complete(source, tmp_path, direction, monkeypatch):
    """The disk fills up at every possible file; with room again the same call ends right."""
    real, target = Journal.add, tmp_path / "out"

    for allowed in range(1, 4):
        added = []

        def add(self, name, facts, added=added, allowed=allowed):
            if len(added) == allowed:
                raise OSError(errno.ENOSPC, "No space left on device", str(target))
            added.append(name)
            real(self, name, facts)

        monkeypatch.setattr(journal.Journal, "add", add)
        with pytest.raises(CheckpointError, match=r"No space left.*make room.*the same command goes on"):
            _convert(source, target, direction)
        assert not target.exists()
    monkeypatch.setattr(journal.Journal, "add", real)
    said = []
    _convert(source, target, direction, lambda done, total, what: said.append(what))
    assert said.count("complete before") >= 3
    _same(source, target, direction)


def _stop():
    raise OSError(errno.EIO, "the cable was pulled")


@pytest.mark.parametrize(
    "change",
    ["dtype", "source", "size", "first_line", "odd_line", "torn"],
)
def test_only_files_of_the_same_job_count(source, tmp_path, change, monkeypatch):
    """An error after a few files; then another dtype, another source, a cut file, another journal: nothing wrong gets into the target."""
    shutil.copytree(source / "hf", tmp_path / "hf")
    target, partial = tmp_path / "out", tmp_path / ".out.partial"
    files, real = [], Journal.add
    monkeypatch.setattr(convert, "threads", lambda: 1)
    monkeypatch.setattr(
        Journal,
        "add",
        lambda self, *facts: (real(self, *facts), files.append(facts[0]), len(files) >= 3 and _stop()),
    )
    with pytest.raises(CheckpointError, match="the cable was pulled"):
        import_hf(tmp_path / "hf", target)
    monkeypatch.setattr(Journal, "add", real)
    complete = len((partial / JOURNAL_NAME).read_text().splitlines()) - 1
    assert complete >= 3
    expected, dtype = 0, None
    if change == "dtype":
        dtype = "fp32"
    elif change == "source":
        shard = next((tmp_path / "hf").glob("*.safetensors"))
        os.utime(shard, ns=(1, 1))
    elif change == "size":
        with (partial / files[0]).open("ab") as stream:
            stream.write(b"x")
        expected = complete - 1
    elif change == "first_line":
        text = (partial / JOURNAL_NAME).read_text()
        (partial / JOURNAL_NAME).write_text(text.replace('"job": "', '"job": "0', 1))
    elif change == "odd_line":
        lines = (partial / JOURNAL_NAME).read_text().splitlines()
        (partial / JOURNAL_NAME).write_text("\n".join([*lines[:-1], "17", lines[-1], ""]))
        expected = complete - 1
    else:
        text = (partial / JOURNAL_NAME).read_bytes()
        (partial / JOURNAL_NAME).write_bytes(text[:-20])
        expected = complete - 1
    said = []
    import_hf(tmp_path / "hf", target, dtype=dtype, progress=lambda done, total, what: said.append(what))
    assert said.count("complete before") == expected
    assert verify(target, tmp_path / "hf").identical


def test_other_errors_leave_nothing(tmp_path):
    def fail():
        with resumable_directory(tmp_path / "out", needed_bytes=0, job={}) as (staging, kept):
            (staging / "file").write_text("x")
            kept.add("file", 1)
            raise CheckpointError("the source is damaged")

    with pytest.raises(CheckpointError):
        fail()
    assert os.listdir(tmp_path) == []


def test_room_is_only_needed_for_what_is_missing(tmp_path, monkeypatch):
    free = 10 * 2**20  # a disk of the test's own: on the real one others write, too
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    def interrupted():
        with resumable_directory(tmp_path / "out", needed_bytes=1000, job={"a": 1}) as (staging, kept):
            (staging / "file").write_bytes(bytes(2**20))
            kept.add("file", 2**20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with (
        pytest.raises(CheckpointError, match="make room"),
        resumable_directory(tmp_path / "out", needed_bytes=free + 2**20 + 1, job={"a": 1}),
    ):
        pass
    with resumable_directory(tmp_path / "out", needed_bytes=free + 2**20 - 1, job={"a": 1}) as (_, kept):
        assert kept.names == {"file"}
        assert (
            json.loads((tmp_path / ".out.partial" / JOURNAL_NAME).read_text().splitlines()[1])["bytes"]
            == 2**20
        )
    assert os.listdir(tmp_path / "out") == ["file"]


def test_without_room_from_the_start_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with (
        pytest.raises(CheckpointError, match="make room"),
        resumable_directory(tmp_path / "out", needed_bytes=11, job={"a": 1}),
    ):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_corrected_config_starts_over(source, tmp_path, direction, monkeypatch):
    """Files of another architecture with the same shapes never get into the target: queries, keys and values lie in another order."""
    shutil.copytree(source / "hf", tmp_path / "hf")
    shutil.copytree(source / "nemo", tmp_path / "nemo")
    folder = tmp_path / ("hf" if direction == "import" else "nemo/context/hf")
    right = (folder / "config.json").read_text()
    wrong = right.replace(
        '"num_attention_heads": 4, "num_key_value_heads": 2',
        '"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4',
    )
    assert wrong != right
    (folder / "config.json").write_text(wrong)
    (tmp_path / "nemo" / "seal.json").unlink()  # changed on purpose
    files, real = [], Journal.add
    monkeypatch.setattr(
        Journal,
        "add",
        lambda self, *facts: (real(self, *facts), files.append(facts), len(files) >= 3 and _stop()),
    )
    with pytest.raises(CheckpointError, match="the cable was pulled"):
        _convert(tmp_path, tmp_path / "out", direction)
    monkeypatch.setattr(Journal, "add", real)
    (folder / "config.json").write_text(right)
    said = []
    _convert(tmp_path, tmp_path / "out", direction, lambda done, total, what: said.append(what))
    assert "complete before" not in said
    _same(tmp_path, tmp_path / "out", direction)


def test_another_source_in_the_same_place_starts_over(source, tmp_path, monkeypatch):
    """Same names, sizes and times, as an unpacked archive has them: another inode."""
    shutil.copytree(source / "hf", tmp_path / "hf")
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    for shard in shards:
        os.utime(shard, ns=(1, 1))
    files, real = [], Journal.add
    monkeypatch.setattr(
        Journal,
        "add",
        lambda self, *facts: (real(self, *facts), files.append(facts), len(files) >= 3 and _stop()),
    )
    with pytest.raises(CheckpointError, match="the cable was pulled"):
        import_hf(tmp_path / "hf", tmp_path / "out")
    monkeypatch.setattr(Journal, "add", real)
    for shard in shards:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").replace(shard)
        os.utime(shard, ns=(1, 1))
    import_hf(tmp_path / "hf", tmp_path / "out")
    assert verify(tmp_path / "out", tmp_path / "hf").identical


def test_a_link_where_the_temporary_directory_goes_is_refused(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="is a link, not a folder of ours: remove it"):
        import_hf(source / "hf", tmp_path / "out")
    assert (tmp_path / "mine" / "file").read_text() == "x"
    (tmp_path / ".out.partial").unlink()


@pytest.mark.parametrize("limit", [3_000, 12_000])
def test_a_limit_met_in_the_middle_of_a_file_is_said_and_the_next_start_goes_on(source, tmp_path, limit):
    """As a disk that fills up behind the look at its free space: torch's own writer would end with an error of its own."""
    shutil.copytree(source / "hf", tmp_path / "hf")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"cannot write .*out \(File too large.*the same command goes on from there"
        ):
            import_hf(tmp_path / "hf", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    import_hf(tmp_path / "hf", tmp_path / "out")
    _same(tmp_path, tmp_path / "out", "import")
