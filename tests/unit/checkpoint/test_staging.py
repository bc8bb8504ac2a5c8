"""A directory appears complete or not at all, and only one process writes it."""

import os
import subprocess
import sys

import pytest

from asft_nemo.checkpoint.staging import staged_directory, sync_small_files
from asft_nemo.errors import CheckpointError


def test_nothing_is_there_until_the_end(tmp_path):
    target = tmp_path / "deep" / "out"
    with staged_directory(target, needed_bytes=0) as staging:
        assert staging.parent == target.parent
        (staging / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_removes_what_was_written(tmp_path, error):
    def fail_half_way():
        with staged_directory(tmp_path / "out", needed_bytes=0) as staging:
            (staging / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    (tmp_path / ".out.partial" / "weights").mkdir(parents=True)
    (tmp_path / ".out.partial" / "weights" / "old").write_text("x")
    (tmp_path / ".out.partial" / "older").write_text("x")
    with staged_directory(tmp_path / "out", needed_bytes=0) as staging:
        assert os.listdir(staging) == []
    assert os.listdir(tmp_path) == ["out"]


def test_a_second_writer_is_refused_and_does_no_harm(tmp_path):
    script = (
        "from asft_nemo.checkpoint.staging import staged_directory\n"
        f"with staged_directory({str(tmp_path / 'out')!r}, needed_bytes=0): pass"
    )
    with staged_directory(tmp_path / "out", needed_bytes=0) as staging:
        (staging / "file").write_text("x")
        done = subprocess.run(
            [sys.executable, "-c", script], timeout=240, check=False, capture_output=True, text=True
        )
        assert "another process is writing" in done.stderr
        assert (staging / "file").read_text() == "x"
    assert os.listdir(tmp_path / "out") == ["file"]


def test_an_existing_target_is_never_touched(tmp_path):
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(CheckpointError, match="exists already"),
        staged_directory(tmp_path / "out", needed_bytes=0),
    ):
        pytest.fail("must not start")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with (
        pytest.raises(CheckpointError, match="exists already"),
        staged_directory(tmp_path / "link", needed_bytes=0),
    ):
        pytest.fail("must not start")
    with (
        pytest.raises(CheckpointError, match="appeared while"),
        staged_directory(tmp_path / "late", needed_bytes=0),
    ):
        (tmp_path / "late").mkdir()
    assert sorted(os.listdir(tmp_path)) == ["late", "link", "out"]


def test_too_little_room_is_said_before_anything_is_written(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"needs 1000000000\.0 GB where [0-9.]+ [GM]B are free"),
        staged_directory(tmp_path / "out", needed_bytes=10**18),
    ):
        pytest.fail("must not start")
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(CheckpointError, match="cannot write"),
        staged_directory(tmp_path / "file" / "out", needed_bytes=0),
    ):
        pytest.fail("must not start")


def test_a_writer_that_another_overtakes_is_refused_with_the_same_words(tmp_path, monkeypatch):
    """Between the first look at the directory and its lock, another process does all of the work."""
    really = os.open

    def overtaken(path, flags, *more):
        if os.path.exists(tmp_path / ".out.partial"):
            os.rename(tmp_path / ".out.partial", tmp_path / "out")
        return really(path, flags, *more)

    monkeypatch.setattr(os, "open", overtaken)
    with pytest.raises(CheckpointError, match=r"another process is writing .*\.out\.partial: wait for it"):
        with staged_directory(tmp_path / "out", needed_bytes=0):
            pytest.fail("it has no lock")
    assert os.listdir(tmp_path) == ["out"]


def test_small_files_and_every_name_reach_the_disk(tmp_path, monkeypatch):
    for name in ("weights/0.distcp", "weights/.metadata", "context/deep/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    )
    sync_small_files(tmp_path, but=".distcp")
    files, folders = (
        ["weights/.metadata", "context/deep/config.json"],
        ["weights", "context/deep", "context", ""],
    )
    assert sorted(synced) == sorted(str(tmp_path / name).rstrip("/") for name in files + folders)
    assert synced[-1] == str(tmp_path), "the names of what lies deeper come first"
