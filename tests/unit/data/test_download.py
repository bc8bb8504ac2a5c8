"""Downloads against a server on this machine: resumed, checked, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from asft_eval.suites.published import SUITES
from asft_eval.suites.questions import questions
from pyarrow import parquet

from asft_nemo import cli
from asft_nemo.data import download as module
from asft_nemo.data.download import RECORD, chosen, download
from asft_nemo.data.published import SETS, Hub, PublishedFile, PublishedSet, Web
from asft_nemo.errors import DataError

CONTENT = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """Serves CONTENT in ways that can be broken.

    Attributes:
        cuts: after how many bytes each of the next answers breaks off.
        ranges: whether parts are given.
        statuses: of the next answers.
        asked: the Range of every GET.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges = CONTENT, True
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("Range"))
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        server, content, status = self.server, self.server.content, 200
        if "missing" in self.path:
            status, content = 404, b""
        elif body and server.statuses:
            status, content = server.statuses.pop(0), b""
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if found and server.ranges and status == 200:
            start = int(found[1])
            status, content = (206, content[start:]) if start < len(content) else (416, b"")
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(server.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if "missing" in self.path:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if body:
            cut = server.cuts.pop(0) if server.cuts else len(content)
            self.wfile.write(content[:cut])
            self.wfile.flush()
            if cut < len(content):
                self.close_connection = True
                self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def published(server: Server, sha256: str | None = DIGEST, path: str = "x.jsonl") -> PublishedFile:
    return PublishedFile("math/x.jsonl", Web(f"{server.url}/{path}"), sha256, None)


def fetch(file: PublishedFile, out: Path) -> module.Fetched:
    return download([file], out, progress=lambda done, total, name: None)[0]


def left(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {".download.lock"}


def test_a_file_is_fetched_checked_and_found_again(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = download(
        [published(server)], tmp_path, progress=lambda done, total, name: seen.append((done, total))
    )
    assert (tmp_path / "math" / "x.jsonl").read_bytes() == CONTENT
    assert (done[0].sha256, done[0].size, done[0].fresh) == (DIGEST, len(CONTENT), True)
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert left(tmp_path) == {"math/x.jsonl", RECORD}
    assert not fetch(published(server), tmp_path).fresh
    assert server.asked == [None]


def test_a_broken_transfer_goes_on_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000, 50_000, 0, 1]
    assert fetch(published(server), tmp_path).sha256 == DIGEST
    assert server.asked == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-", "bytes=150001-"]


def test_a_later_call_goes_on_where_the_first_was_killed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "x.jsonl.part").write_bytes(CONTENT[:777])
    assert fetch(published(server), tmp_path).sha256 == DIGEST
    assert server.asked == ["bytes=777-"]


def test_without_ranges_it_begins_anew(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cuts = False, [100_000]
    assert fetch(published(server), tmp_path).sha256 == DIGEST


def test_a_part_longer_than_the_file_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "x.jsonl.part").write_bytes(CONTENT + b"more")
    assert fetch(published(server), tmp_path).sha256 == DIGEST


def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not the published file .* nothing was kept"):
        fetch(published(server, sha256="0" * 64), tmp_path)
    assert left(tmp_path) == set()


def test_without_a_published_checksum_the_first_download_counts(server: Server, tmp_path: Path) -> None:
    first = fetch(published(server, sha256=None), tmp_path)
    assert (first.known, json.loads((tmp_path / RECORD).read_text())["math/x.jsonl"]["sha256"]) == (
        False,
        DIGEST,
    )
    first.path.unlink()
    server.content = CONTENT + b"changed"
    with pytest.raises(DataError, match="is not the first downloaded file"):
        fetch(published(server, sha256=None), tmp_path)
    assert left(tmp_path) == {RECORD}


def test_without_a_published_checksum_a_file_put_there_by_hand_counts(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "math" / "x.jsonl"
    path.parent.mkdir()
    path.write_text("mine")
    file = published(server, sha256=None)
    for _ in range(2):
        found = fetch(file, tmp_path)
        assert (found.size, found.sha256, found.known, found.fresh) == (
            4,
            hashlib.sha256(b"mine").hexdigest(),
            False,
            False,
        )
    assert json.loads((tmp_path / RECORD).read_text())["math/x.jsonl"]["sha256"] == found.sha256
    assert server.asked == []
    path.write_text("changed")
    with pytest.raises(DataError, match=r"is not the file that was there first .*: move it away"):
        fetch(file, tmp_path)


def test_a_changed_file_in_place_is_not_overwritten(server: Server, tmp_path: Path) -> None:
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "x.jsonl").write_text("mine")
    with pytest.raises(DataError, match=r"is not the published file .*: move it away"):
        fetch(published(server), tmp_path)
    assert (tmp_path / "math" / "x.jsonl").read_text() == "mine"


def test_a_server_with_trouble_is_asked_again_and_not_for_ever(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    assert fetch(published(server), tmp_path).fresh
    server.statuses = [503] * 9
    with pytest.raises(DataError, match=r"cannot be reached \(HTTP 503\): go online"):
        fetch(published(server), tmp_path / "other")
    assert len(server.statuses) == 4


def test_what_is_not_there_is_said(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing is not there \(HTTP 404\)"):
        fetch(published(server, path="missing"), tmp_path)


def test_no_server_is_one_sentence(tmp_path: Path) -> None:
    file = PublishedFile("x.jsonl", Web("http://127.0.0.1:9/x.jsonl"), DIGEST, None)
    with pytest.raises(
        DataError, match=r"127.0.0.1:9/x.jsonl cannot be reached .*: go online .* put it into the folder"
    ):
        fetch(file, tmp_path)


def test_a_folder_that_cannot_be_written_is_one_sentence(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "math").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken" / "below", tmp_path / "out"):
        with pytest.raises(DataError, match="is a file where a folder is needed: give another folder"):
            fetch(published(server), out)
    for number, says in (
        (errno.EACCES, r"other cannot be written \(Permission denied\): correct the permissions"),
        (errno.ENOSPC, r"other cannot be written \(No space left on device\): make room"),
        (errno.EROFS, r"other cannot be written \(Read-only file system\): give another folder"),
    ):

        def broken(*_: Any, number: int = number) -> None:
            raise OSError(number, os.strerror(number), str(tmp_path / "other"))

        with monkeypatch.context() as patch:
            patch.setattr(module.os, "replace", broken)
            with pytest.raises(DataError, match=says):
                fetch(published(server), tmp_path / "other")


def test_two_downloads_into_one_folder(server: Server, tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".download.lock"), pytest.raises(DataError, match="under way"):
        fetch(published(server), tmp_path)


def test_files_of_the_hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import reset_sessions

    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    file = PublishedFile("train/x.jsonl", Hub("owner/name", COMMIT, "data/x.jsonl"), DIGEST, None)
    assert fetch(file, tmp_path).fresh
    assert left(tmp_path) == {"train/x.jsonl", RECORD}
    with pytest.raises(DataError, match="is not there, or not for everyone"):
        fetch(PublishedFile("y", Hub("owner/name", COMMIT, "missing"), None, None), tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reset_sessions()  # offline is a property of the session
    try:
        with pytest.raises(DataError, match=r"cannot be reached .*: go online"):
            fetch(PublishedFile("z", Hub("owner/name", COMMIT, "z.jsonl"), None, None), tmp_path)
    finally:
        reset_sessions()


def test_parquet_becomes_the_lines_that_suites_read(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = ("anatomy", "physics", "virology")
    table = [
        {"question": f"é {name}", "subject": name, "choices": ["x", "y"], "answer": 1} for name in subjects
    ]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "made.parquet")
    server.content = (tmp_path / "made.parquet").read_bytes()
    suite = SETS["mmlu"].files[0].lines
    file = PublishedFile("medical/x.parquet", Web(f"{server.url}/x"), None, None, suite)
    (tmp_path / "made.parquet").unlink()
    fetch(file, tmp_path)
    monkeypatch.setenv("ASFT_DATA_DIR", str(tmp_path))
    assert questions("mmlu_medical") == ["é anatomy", "é virology"]
    assert left(tmp_path) == {"medical/x.parquet", "medical/mmlu_medical_test.jsonl", RECORD}


def test_the_subjects_are_those_of_the_suite(data_dir: Path) -> None:
    suite = data_dir / "medical" / "mmlu_medical_test.jsonl"
    lines = SETS["mmlu"].files[0].lines
    assert lines is not None
    assert {json.loads(line)["subject"] for line in suite.read_text().splitlines()} == set(lines.subjects)


def test_the_table_holds_together() -> None:
    names = [file.name for found in SETS.values() for file in found.files]
    assert len(set(names)) == len(names)
    for found in SETS.values():
        for file in found.files:
            assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            pinned = re.search(r"/[0-9a-f]{40}/", str(file.source)) is not None
            assert pinned or "chichi56/ASFT" in str(file.source)


def test_evaluation_sets_lie_where_the_suites_look(data_dir: Path) -> None:
    """The digests are those of the files that the suites were built on."""
    held = 0
    for found in SETS.values():
        for file in found.files:
            path = data_dir / file.name
            if (
                path.is_file() and file.name != "math/math500_test.jsonl"
            ):  # the same rows, written another way
                assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
                assert path.stat().st_size == file.size
                held += 1
    assert held == 6
    names = [file.name for found in SETS.values() for file in found.files]
    names += [file.lines.name for found in SETS.values() for file in found.files if file.lines]
    assert {suite.file for suite in SUITES.values() if suite.download} <= set(names)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(DataError, match=r"no published set gsm9k: did you mean gsm8k\?"):
        chosen(["gsm9k"])
    with pytest.raises(DataError, match="known are numina-cot-10k, "):
        chosen(["zzz"])


def test_the_command(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = PublishedSet("a set", 3, "MIT", (published(server),))
    monkeypatch.setattr(module, "SETS", {"mine": own})
    assert cli.main(["data", "download", "mine", "--json", f"--out={tmp_path}"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["sha256"] == DIGEST
    assert cli.main(["data", "download", "mine", "--list"]) == 0
    assert "a set; 3 rows, size unknown, checksum known\n  licence: MIT" in capsys.readouterr().out
    for words, says in (
        (["mine"], "give --out=DIR"),
        ([], "got no name"),
        (["x", "--out=y"], "no published set x"),
        (["mine", f"--out={tmp_path / RECORD}"], "is a file where a folder is needed"),
    ):
        assert cli.main(["data", "download", *words]) == 2
        assert says in capsys.readouterr().err
