"""A prepared directory is whole or not there: kills, half-written chunks, changed files, errors of the system, damage."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preparing import BAD, ROWS, Writer, contents, made

from asft_nemo.config.schema import DataConfig
from asft_nemo.data import SupervisedDataset, TextTokenizer, workers
from asft_nemo.data.digests import digest
from asft_nemo.data.store import PartWriter
from asft_nemo.errors import DataError

pytestmark = pytest.mark.usefixtures("small_chunks")


def killed_at(call: int) -> Callable[..., None]:
    """A progress callback that ends the process as an operator or the system's memory guard does."""
    calls = 0

    def show(done: int, total: int, name: str) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)

    return show


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_is_gone_on_with(model: Path, jsonl: Writer, tmp_path: Path, workers: int) -> None:
    files = [jsonl(*BAD, *ROWS[:20], name="1.jsonl"), jsonl(*ROWS[20:], name="2.jsonl")]
    settings: dict[str, Any] = {"template": "raw", "on_bad_row": "skip", "workers": workers}
    whole = made(model, tmp_path / "whole", *files, **settings)
    out, rounds, seen = tmp_path / "out", 0, []
    fork = multiprocessing.get_context("fork")

    def recorded() -> list[Path]:
        return [*out.glob("parts/*/part.json"), *out.glob("unfinished/*/progress.json")]

    while not (out / "manifest.json").exists():
        process = fork.Process(
            target=made, args=(model, out, *files), kwargs={"progress": killed_at(3), **settings}
        )
        process.start()
        process.join(30)
        assert process.exitcode in (0, -signal.SIGKILL)
        rounds += 1
        assert rounds < 10
        seen.append(sum(json.loads(path.read_text())["counts"]["rows"] for path in recorded()))
    assert rounds >= 3
    assert seen[:-1] == sorted(set(seen[:-1]))  # every round comes further; the last one writes the manifest
    assert whole.manifest.total().rows == 63
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.timeout(60)
def test_a_killed_run_leaves_nobody_who_keeps_its_lock(
    model: Path, jsonl: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of its tokenising processes comes up late, and would hold what it was forked with."""
    file, out, begin = jsonl(*ROWS), tmp_path / "out", workers._begin
    made(model, tmp_path / "whole", file)

    def late(*given: Any) -> None:
        try:
            (tmp_path / "first").touch(exist_ok=False)
        except FileExistsError:
            time.sleep(1.0)
        begin(*given)

    monkeypatch.setattr(workers, "_begin", late)
    process = multiprocessing.get_context("fork").Process(
        target=made, args=(model, out, file), kwargs={"progress": killed_at(1), "workers": 2}
    )
    process.start()
    process.join()  # with a time limit it would also wait for those that the process has forked
    assert process.exitcode == -signal.SIGKILL
    made(model, out, file)
    assert contents(out) == contents(tmp_path / "whole")


def test_what_was_written_after_the_last_record_is_written_again(
    model: Path, jsonl: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a chunk on disk, as a kill between two writes leaves it."""
    file, out = jsonl(*ROWS), tmp_path / "out"
    made(model, tmp_path / "whole", file)
    appended, whole = 0, PartWriter.append

    def half(self: PartWriter, chunk: Any) -> None:
        nonlocal appended
        appended += 1
        if appended == 4:
            self._streams["tokens.bin"].write(b"123")
            self._streams["tokens.bin"].flush()
            raise KeyboardInterrupt
        whole(self, chunk)

    monkeypatch.setattr(PartWriter, "append", half)
    with pytest.raises(KeyboardInterrupt):
        made(model, out, file)
    assert not (out / "manifest.json").exists()
    monkeypatch.setattr(PartWriter, "append", whole)
    done: list[int] = []
    made(model, out, file, progress=lambda bytes_done, total, name: done.append(bytes_done))
    assert len(done) == 9 - 3 + 1  # chunks of 60 rows in sevens, less those recorded, and the end
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("ends", ["refused", "killed"])
def test_rows_of_other_bytes_are_not_gone_on_with(
    model: Path, jsonl: Writer, tmp_path: Path, ends: str
) -> None:
    """A file is overwritten after its digest was taken and restored, its time too, after the run has ended."""
    file, other, out = jsonl(*ROWS), jsonl(*ROWS[::-1], name="other.jsonl"), tmp_path / "out"
    whole = made(model, tmp_path / "whole", file)
    before, times = file.read_bytes(), file.stat()
    set_back = (times.st_atime_ns, times.st_mtime_ns)
    read_as_other = 0

    def overwrite(done: int, total: int, name: str) -> None:
        nonlocal read_as_other
        read_as_other += 1
        if ends == "killed" and read_as_other == 3:
            raise KeyboardInterrupt

    def digest_then_overwrite(path: Path) -> bytes:
        found = digest(path)
        path.write_bytes(other.read_bytes())
        if ends == "killed":
            os.utime(path, ns=set_back)  # not even the time shows it
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asft_nemo.data.preparation.digest", digest_then_overwrite)
        expected = KeyboardInterrupt if ends == "killed" else DataError
        with pytest.raises(expected, match=None if ends == "killed" else "has changed while it was read"):
            made(model, out, file, progress=overwrite)
    assert read_as_other >= 3
    assert bool(list(out.glob("unfinished/*/progress.json"))) == (ends == "killed")
    time.sleep(0.02)  # more than the file system's tick
    file.write_bytes(before)
    os.utime(file, ns=set_back)
    assert made(model, out, file).manifest.total() == whole.manifest.total()
    assert contents(out) == contents(tmp_path / "whole")


def test_a_tokenising_process_that_ends_by_itself_is_an_error(
    model: Path, jsonl: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asft_nemo.data.workers.Setup.__call__", lambda self, task: os._exit(9))
    with pytest.raises(DataError, match=r"a tokenising process ended by itself, .* with fewer --workers"):
        made(model, tmp_path / "out", jsonl(*ROWS), workers=2)


def test_only_one_call_writes_at_a_time(model: Path, jsonl: Writer, tmp_path: Path) -> None:
    file, out = jsonl(*ROWS[:9]), tmp_path / "out"
    made(model, out, file)
    with (out / ".lock").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another asft data prepare is writing to"):
            made(model, out, file)
    assert made(model, out, file).unchanged


def test_an_error_of_the_system_names_what_it_is_about(
    model: Path, jsonl: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(done: int, total: int, name: str) -> None:
        (tmp_path / name).unlink(missing_ok=True)

    def fails(number: int) -> Callable[..., None]:
        def call(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        return call

    file, out = jsonl(*ROWS), tmp_path / "out"
    with pytest.raises(DataError, match=rf"^data file {file} cannot be read \(No such file .*: put it back$"):
        made(model, out, file, progress=gone)
    file = jsonl(*ROWS)
    with monkeypatch.context() as patch:
        for number in (errno.ENOSYS, errno.ENOTSUP):
            patch.setattr("fcntl.flock", fails(number))
            with pytest.raises(
                DataError, match=f"the file system of {out} has no locks .*: give another --out"
            ):
                made(model, out, file)
    with monkeypatch.context() as patch:
        patch.setattr("os.fork", fails(errno.EAGAIN))
        with pytest.raises(DataError, match=r"3 tokenising processes cannot be started .* fewer --workers"):
            made(model, out, file, workers=3)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fails(errno.ENOSPC))
        with pytest.raises(DataError, match=f"{out} cannot be written .*No space left.*: free space there"):
            made(model, out, file)
    assert made(model, out, file).manifest.total().rows == 60


@pytest.mark.parametrize("name", ["tokens.bin", "spans.bin", "index.bin", "part.json"])
def test_a_damaged_part_is_named_and_made_again(
    model: Path, jsonl: Writer, tmp_path: Path, name: str
) -> None:
    file, out, tokenizer = jsonl(*ROWS[:9]), tmp_path / "out", TextTokenizer.load(model)
    made(model, out, file)
    [path] = out.rglob(name)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"{path} (has|is).*: run asft data prepare again"):
        SupervisedDataset.from_files([out], DataConfig(), tokenizer=tokenizer)
    assert made(model, out, file).made == 1
    SupervisedDataset.from_files([out], DataConfig(), tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["tokens.bin", "spans.bin", "index.bin", "part.json", "manifest.json"])
def test_a_flipped_bit_is_named_and_made_again(model: Path, jsonl: Writer, tmp_path: Path, name: str) -> None:
    """With size and times as they were: what a disk does."""
    file, out, tokenizer = jsonl(*ROWS[:9]), tmp_path / "out", TextTokenizer.load(model)
    made(model, out, file)
    [path] = out.rglob(name)
    state, data = path.stat(), bytearray(path.read_bytes())
    place = data.rindex(b"1") if path.suffix == ".json" else len(data) // 2
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(DataError, match=rf"{path} .*: run asft data prepare again"):
        SupervisedDataset.from_files([out], DataConfig(), tokenizer=tokenizer)
    assert made(model, out, file).made == (0 if name == "manifest.json" else 1)
    SupervisedDataset.from_files([out], DataConfig(), tokenizer=tokenizer)
