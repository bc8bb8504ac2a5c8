"""Preparing takes memory for a chunk, not for a file."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from preparing import Writer, made
from pyarrow import parquet

from asft_nemo.config.schema import DataConfig
from asft_nemo.data import TextTokenizer, Tokenized
from asft_nemo.data.workers import Setup, tasks

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_task_of_long_rows_is_small_in_every_format(
    jsonl: Writer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """In rows and bytes, also as it travels; with the same parts as from lines; the tokenizer gets some of it at a time."""
    monkeypatch.setattr("asft_nemo.data.workers._CHUNK_ROWS", 1024)
    monkeypatch.setattr("asft_nemo.data.files._BATCH", 1024)
    long_rows = [{"instruction": "add " * 7500, "response": f"{number}"} for number in range(300)]
    table, path = pyarrow.Table.from_pylist(long_rows), tmp_path / f"rows.{form}"
    if form == "parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    found = list(tasks(path, DataConfig().fields, skip_rows=0))
    assert sum(task.rows for task in found) == 300
    assert max(task.nbytes for task in found) < 2 << 20
    assert max(len(pickle.dumps(task)) for task in found) < 2.2 * (1 << 20)
    resumed = list(tasks(path, DataConfig().fields, skip_rows=found[0].rows + found[1].rows))
    assert [task.rows for task in resumed] == [task.rows for task in found[2:]]

    most, encode = 0, TextTokenizer.encode

    def watched(self: TextTokenizer, texts: Any) -> list[Tokenized]:
        nonlocal most
        most = max(most, sum(len(text.text) for text in texts))
        return encode(self, texts)

    setup = Setup(DataConfig(template="raw"), TextTokenizer.load(model), None)
    monkeypatch.setattr(TextTokenizer, "encode", watched)
    chunk = setup(found[0])
    assert most <= (1 << 18) + 30_010
    monkeypatch.setattr("asft_nemo.data.workers._CHUNK_BYTES", 1 << 30)
    [lines] = tasks(jsonl(*long_rows[: found[0].rows]), DataConfig().fields, skip_rows=0)
    expected = setup(lines)
    assert (chunk.tokens.tobytes(), chunk.index.tobytes()) == (
        expected.tokens.tobytes(),
        expected.index.tobytes(),
    )


@pytest.mark.parametrize("megabytes", [3, 30])
def test_memory_is_bounded_by_the_chunk_not_by_the_file(
    model: Path, jsonl: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, megabytes: int
) -> None:
    monkeypatch.setattr("asft_nemo.data.workers._CHUNK_ROWS", 1024)
    # Tokenising 30 MB would take a minute; a token for every four characters, as a tokenizer finds.
    monkeypatch.setattr(
        TextTokenizer,
        "encode",
        lambda self, texts: [
            Tokenized([1] * (len(text.text) // 4), [True] * (len(text.text) // 4)) for text in texts
        ],
    )
    line = {"instruction": "add " * 250, "response": "42 " * 2700}
    file = jsonl(*[line] * (megabytes * 110))
    tracemalloc.start()
    try:
        made(model, tmp_path / "out", file, template="raw")
        assert tracemalloc.get_traced_memory()[1] < 25_000_000
    finally:
        tracemalloc.stop()
