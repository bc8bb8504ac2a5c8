"""What torch says of a write that failed on several ranks derives from no Exception: it is told apart from a bug all the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from asft_nemo.errors import CheckpointError
from asft_nemo.nemo.checkpoints import full_disk_named

pytestmark = pytest.mark.nemo


def failed() -> CheckpointException:
    return CheckpointException("write", {0: _wrap_exception(RuntimeError("unexpected pos 704 vs 598"))})


@pytest.mark.parametrize(("free", "kind"), [(4096, CheckpointError), (1 << 40, CheckpointException)])
def test_only_where_the_disk_is_full_it_is_named(
    free: int, kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(kind), full_disk_named(tmp_path / "partial_step_2"):
        raise failed()
