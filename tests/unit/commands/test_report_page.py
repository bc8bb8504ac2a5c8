"""`asft report` on a full disk: no part of a page under its name, and a former page stays."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from asft_nemo.commands.report import _write
from asft_nemo.errors import UserError


@contextmanager
def small_files() -> Iterator[None]:
    """No file may become larger than a page of memory, as on a disk that fills up; that of pytest's own words neither, so for a moment only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("former", [None, "a page"])
def test_a_page_that_cannot_be_written_is_not_there(former: str | None, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    if former is not None:
        out.write_text(former)
    says = r"report\.html cannot be written \(File too large\): give --out FILE"
    with pytest.raises(UserError, match=says), small_files():
        _write(out, "x" * 10_000)
    assert [path.read_text() for path in tmp_path.iterdir()] == ([] if former is None else [former])


def test_a_page_takes_the_place_of_a_former_one(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    for page in ("one", "two"):
        _write(out, page)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["two"]
