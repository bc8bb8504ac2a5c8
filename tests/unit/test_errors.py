"""What the system says of files and disks is the user's to mend: one sentence and exit code 2, no traceback."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from asft_nemo import cli
from asft_nemo.errors import mendable


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EIO, errno.EISDIR, errno.EFBIG]
)
def test_a_sentence_names_the_file_and_a_cure(number: int) -> None:
    told = mendable(OSError(number, os.strerror(number), "/data/x"))
    assert str(told).startswith(f"/data/x cannot be used ({os.strerror(number)}): ")


def test_what_has_no_file_and_what_nobody_can_mend() -> None:
    told = mendable(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert (
        str(told)
        == "a file cannot be written (No space left on device): make room, or choose a place on another disk"
    )
    assert mendable(OSError("transformers says so")) is None
    assert mendable(OSError(errno.EBADF, "bad")) is None


def test_a_copy_of_a_folder_that_fails_names_file_and_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.json").write_text("{}")

    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    with pytest.raises(shutil.Error) as raised:
        shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=full)
    target = tmp_path / "b" / "tokenizer.json"
    assert str(mendable(raised.value)) == (
        f"{target} cannot be written (No space left on device): make room, or choose a place on another disk"
    )
    assert mendable(shutil.Error([("a", "b", "no idea")])) is None


def test_the_command_says_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keep_logging_and_warnings: None
) -> None:
    """A folder where the configuration should be."""
    (tmp_path / "config.json").mkdir()
    (tmp_path / "tokenizer.json").mkdir()
    code = cli.main(["import", str(tmp_path), str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in said
    assert "config.json" in said
