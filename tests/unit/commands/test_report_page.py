"""`asft report` on a full disk: no part of a page under its name, and a former page stays."""

from __future__ import annotations

import os
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


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    page, link = tmp_path / "pages" / "page.html", tmp_path / "report.html"
    page.write_text("one")
    link.symlink_to(page)
    _write(link, "two")
    assert link.is_symlink()
    assert page.read_text() == "two"
    assert sorted(path.name for path in (tmp_path / "pages").iterdir()) == ["page.html"]


def test_a_pipe_takes_the_page_as_it_comes(tmp_path: Path) -> None:
    """As /dev/stdout is one, in front of another command."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _write(pipe, "a page")
        assert os.read(reader, 100) == b"a page"
    finally:
        os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
