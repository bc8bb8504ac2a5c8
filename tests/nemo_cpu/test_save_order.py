"""In which order a checkpoint reaches the disk: a machine that loses its power at any moment has a whole checkpoint under `latest`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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


def save(run_dir: Path) -> None:
    def save_checkpoint(partial: str) -> None:
        weights = Path(partial) / "weights"
        weights.mkdir()
        (weights / "__0_0.distcp").write_bytes(b"synced by Megatron's writer")
        (weights / "common.pt").write_bytes(b"and this one is not")

    nothing = SimpleNamespace(finish_writing=lambda: None, save_snapshot=lambda partial: None)
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
    assert files == {"common.pt", "tokenizer.json", "model.yaml", "run.json", "seal.json"}
    folders = {path.name for path in step.rglob("*") if path.is_dir()} | {"partial_step_2"}
    assert folders == {"weights", "context", "nemo_tokenizer", "partial_step_2"}
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
