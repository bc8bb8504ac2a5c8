"""In which order a checkpoint reaches the disk, and that a part of one takes nobody's place: whatever happens, `latest` is a whole one."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from asft_nemo.errors import CheckpointError
from asft_nemo.nemo import checkpoints
from asft_nemo.nemo.checkpoints import CheckpointCallback
from asft_nemo.nemo.keep import Keep

pytestmark = pytest.mark.nemo


class Disk:
    """Which names and bytes of a folder a loss of power would leave: what was synced since it was last written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.events: list[tuple[str, str]] = []
        fsync, replace, rename, rmtree = os.fsync, os.replace, Path.rename, shutil.rmtree

        def synced(descriptor: int) -> None:
            self.events.append(("synced", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
            fsync(descriptor)

        def replaced(old: Any, new: Any) -> None:
            self.events.append(("moved", Path(new).name))
            replace(old, new)

        def renamed(path: Path, new: Any) -> Path:
            self.events.append(("moved", Path(new).name))
            return rename(path, new)

        def removed(path: Any, *rest: Any, **more: Any) -> None:
            self.events.append(("removed", Path(path).name))
            rmtree(path, *rest, **more)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", replaced)
        monkeypatch.setattr(Path, "rename", renamed)
        monkeypatch.setattr(shutil, "rmtree", removed)

    def after(self, event: tuple[str, str]) -> list[tuple[str, str]]:
        return self.events[self.events.index(event) + 1 :]

    def before(self, event: tuple[str, str]) -> list[tuple[str, str]]:
        return self.events[: self.events.index(event)]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for folder in (tmp_path / "base" / "context" / "nemo_tokenizer", run / "checkpoints" / "step_1"):
        folder.mkdir(parents=True)
    (tmp_path / "base" / "context" / "nemo_tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "context" / "model.yaml").write_text("a: 1")
    (run / "run.json").write_text("{}")
    (run / "checkpoints" / "latest").symlink_to("step_1")
    return run


def save(run_dir: Path, *, afterwards: Callable[[Path], object] = lambda partial: None) -> None:
    """Saves step 2.

    Args:
        run_dir: has the checkpoint of step 1.
        afterwards: happens to the folder once its tensors are written.
    """

    def save_checkpoint(partial: str) -> None:
        weights = Path(partial) / "weights"
        write(weights)
        (weights / "common.pt").write_bytes(b"torch's writer syncs the other two, and not this one")

    def write(folder: Path) -> None:
        writer = dcp.FileSystemWriter(folder, single_file_per_rank=False, thread_count=2)
        dcp.save({"a": torch.ones(3), "b": torch.ones(5)}, storage_writer=writer, no_dist=True)

    def save_snapshot(partial: Path) -> None:
        write(partial / "old_policy")
        afterwards(partial)

    nothing = SimpleNamespace(finish_writing=lambda: None, save_snapshot=save_snapshot)
    saver = CheckpointCallback(
        run_dir,
        run_dir.parent / "base",
        nothing,  # type: ignore[arg-type]
        adapters=None,
        metrics=SimpleNamespace(validated=-1),  # type: ignore[arg-type]
        every=1,
        max_steps=2,
        keep=Keep("last:1", run_dir),
    )
    trainer = SimpleNamespace(
        is_global_zero=True, strategy=SimpleNamespace(barrier=lambda: None), save_checkpoint=save_checkpoint
    )
    saver.save(trainer, 2, best=False)


def test_all_of_it_is_on_the_disk_before_latest_moves(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    save(run_dir)
    step = run_dir / "checkpoints" / "step_2"
    files = {path.name for path in step.rglob("*") if path.is_file() and path.suffix != ".distcp"}
    assert files == {".metadata", "common.pt", "tokenizer.json", "model.yaml", "run.json", "seal.json"}
    folders = {path.name for path in step.rglob("*") if path.is_dir()} | {"partial_step_2"}
    assert folders == {"weights", "old_policy", "context", "nemo_tokenizer", "partial_step_2"}
    assert {("synced", name) for name in files | folders} <= set(disk.before(("moved", "step_2")))
    between = disk.after(("moved", "step_2"))
    assert between.index(("synced", "checkpoints")) < between.index(("moved", "latest"))


def test_latest_is_on_the_disk_before_the_one_before_it_goes(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    save(run_dir)
    assert os.readlink(run_dir / "checkpoints" / "latest") == "step_2"
    assert not (run_dir / "checkpoints" / "step_1").exists()
    later = disk.after(("moved", "latest"))
    gone = [event for event in later if "step_1" in event[1]]
    assert gone
    assert later.index(("synced", "checkpoints")) < later.index(gone[0])
    assert not [event for event in disk.before(("moved", "latest")) if "step_1" in event[1]]


def test_a_base_that_nobody_may_write_to_makes_no_such_checkpoint(run_dir: Path) -> None:
    """One that others share: its context is of the run's own from then on, to add run.json to and to remove."""
    context = run_dir.parent / "base" / "context"
    (context / "run.json").write_text("of the run that the base is a checkpoint of")
    for path in (*context.rglob("*"), context):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        save(run_dir)
    finally:
        for path in (context, *context.rglob("*")):
            path.chmod(0o755)
    written = run_dir / "checkpoints" / "step_2" / "context"
    assert all(path.stat().st_mode & 0o200 for path in (written, *written.rglob("*")))
    assert (written / "run.json").read_text() == "{}"


def shards(partial: Path) -> list[Path]:
    found = sorted(partial.glob("weights/*.distcp"))
    assert len(found) == 2
    return found


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    "loss",
    [
        lambda partial: shards(partial)[1].unlink(),
        lambda partial: cut(shards(partial)[0]),
        lambda partial: next(partial.glob("old_policy/*.distcp")).unlink(),
    ],
    ids=["a file", "the end of one", "of a snapshot"],
)
def test_what_lacks_other_ranks_files_is_no_checkpoint(
    loss: Callable[[Path], None], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines with a folder each: what the second wrote is not in the first one's."""
    monkeypatch.setattr(checkpoints, "_HIDDEN_SECONDS", 0.05)
    monkeypatch.setattr(checkpoints, "_LOOK_SECONDS", 0.02)
    said = rf"stays: 1 of 4 files that ranks wrote are not in run.dir={run_dir} on .* that all machines share"
    with pytest.raises(CheckpointError, match=said):
        save(run_dir, afterwards=loss)
    folder = run_dir / "checkpoints"
    assert os.readlink(folder / "latest") == "step_1"
    assert {path.name for path in folder.iterdir()} == {"latest", "step_1", "partial_step_2"}
    assert not (folder / "partial_step_2" / "seal.json").exists()


def test_a_file_that_shows_late_is_waited_for(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network file system may show one that another machine has written."""
    monkeypatch.setattr(checkpoints, "_LOOK_SECONDS", 0.02)
    shown: list[threading.Timer] = []

    def hide(partial: Path) -> None:
        file = shards(partial)[0]
        hidden = run_dir / file.name
        file.rename(hidden)
        shown.append(threading.Timer(0.3, hidden.rename, [file]))
        shown[0].start()

    save(run_dir, afterwards=hide)
    shown[0].join()
    step = run_dir / "checkpoints" / "latest"
    assert os.readlink(step) == "step_2"
    assert len(shards(step.resolve())) == 2
