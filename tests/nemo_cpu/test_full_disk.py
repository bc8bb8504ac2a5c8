"""A checkpoint that does not fit on the disk: whatever the writers said, the disk is named where it is full, and only there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from asft_nemo.errors import CheckpointError
from asft_nemo.nemo.checkpoints import full_disk_named

pytestmark = pytest.mark.nemo


def room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, 4096)
    said = r"partial_step_3 cannot be written, for that disk is full \(4096 bytes are free\): make room, then go on .* trainer.resume=must"
    with pytest.raises(CheckpointError, match=said), full_disk_named(tmp_path / "partial_step_3"):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


def test_another_failure_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, 1 << 40)
    with pytest.raises(RuntimeError, match="unexpected pos"), full_disk_named(tmp_path / "partial_step_3"):
        raise RuntimeError("unexpected pos")
