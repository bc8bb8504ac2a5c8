"""The same rows come out of every format, and what cannot be read is refused with its reason."""

from __future__ import annotations

import gzip
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from asft_nemo.config.schema import DataConfig, FieldsConfig
from asft_nemo.data import BadRow, Record, fingerprint, read_records
from asft_nemo.data.files import MOST_BYTES, expand, rows
from asft_nemo.errors import DataError

ROWS = [{"question": f"add {i} and 1 é", "answer": f"{i + 1}"} for i in range(3000)]


def as_lines() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def plain(folder: Path) -> Path:
    (folder / "rows.jsonl").write_bytes(as_lines())
    return folder / "rows.jsonl"


def gzipped(folder: Path) -> Path:
    half = len(as_lines()) // 2  # two members, as concatenated files have
    (folder / "rows.jsonl.gz").write_bytes(
        gzip.compress(as_lines()[:half]) + gzip.compress(as_lines()[half:])
    )
    return folder / "rows.jsonl.gz"


def zstd(folder: Path) -> Path:
    with pyarrow.output_stream(folder / "rows.jsonl.zst", compression="zstd") as stream:
        stream.write(as_lines())
    return folder / "rows.jsonl.zst"


def parquet_file(folder: Path) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=700)
    return folder / "rows.parquet"


def saved_dataset(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def texts(source: Path | str) -> list[tuple[str, str]]:
    found = list(read_records([source], FieldsConfig()))
    pairs = [record.conversation.pair() for record in found if isinstance(record, Record)]
    assert len(pairs) == len(found)
    return [pair for pair in pairs if pair is not None]


@pytest.mark.parametrize("make", [plain, gzipped, zstd, parquet_file, saved_dataset])
def test_every_format_gives_the_same_rows(make: Callable[[Path], Path], tmp_path: Path) -> None:
    source = make(tmp_path)
    assert texts(source) == [(row["question"], row["answer"]) for row in ROWS]
    numbers = [number for path in expand(source) for number, _ in rows(path)]
    assert numbers[:3] == [1, 2, 3]
    if source.is_file():
        assert numbers == list(range(1, 3001))


@pytest.mark.parametrize("make", [gzipped, zstd, parquet_file])
def test_a_file_that_is_cut_off_is_refused(make: Callable[[Path], Path], tmp_path: Path) -> None:
    source = make(tmp_path)
    source.write_bytes(source.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"rows\.\S+ is cut off or damaged .*: fetch it again"):
        texts(source)


def test_directories_and_patterns_stand_for_their_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    row = json.dumps(ROWS[0])
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "notes.txt"):
        (tmp_path / name).write_text(row)
    assert [path.name for path in expand(tmp_path)] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert [path.name for path in expand(f"{tmp_path}/*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in expand(f"{tmp_path}/**/*.jsonl")] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    both = list(read_records([f"{tmp_path}/*.jsonl", tmp_path / "deep"], FieldsConfig()))
    assert [record.domain for record in both if isinstance(record, Record)] == [0, 0, 1]
    with pytest.raises(DataError, match="does not exist"):
        expand(f"{tmp_path}/*.parquet")
    model = Path(__file__).parents[3] / "assets" / "tiny-base"
    one, other = (
        fingerprint([source], DataConfig(), tokenizer_dir=model)
        for source in (tmp_path / "deep", f"{tmp_path}/*.jsonl")
    )
    assert one != other


def test_a_dataset_with_several_splits_asks_for_one(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list(ROWS[:2])
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "both")
    with pytest.raises(
        DataError, match=r"holds several splits of a dataset: name one of .*both/test, .*both/train"
    ):
        expand(tmp_path / "both")
    assert len(texts(tmp_path / "both" / "train")) == 2
    next((tmp_path / "both" / "test").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match="is missing: save the dataset again"):
        expand(tmp_path / "both" / "test")


def test_bad_rows_of_parquet_are_located(tmp_path: Path) -> None:
    values: list[Any] = [*ROWS[:2], {"question": None, "answer": "x"}, {"question": "x", "answer": "\n"}]
    parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "rows.parquet")
    bad = [
        row for row in read_records([tmp_path / "rows.parquet"], FieldsConfig()) if isinstance(row, BadRow)
    ]
    assert [(row.line, row.reason) for row in bad] == [
        (3, "field 'question' is null where text is needed"),
        (4, "field 'answer' is empty"),
    ]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_rows_that_python_cannot_hold_are_bad_ones(tmp_path: Path, form: str) -> None:
    texts, far = pyarrow.array(["add 1", "caf\u00e9", "add 2", "add 3"]), pyarrow.array([0, 0, 0, 1 << 62])
    raw = (
        texts.buffers()[2].to_pybytes().replace("\u00e9".encode(), b"\xe9 ")
    )  # Latin-1, which no writer notices
    damaged = pyarrow.Array.from_buffers(
        pyarrow.string(), 4, [None, texts.buffers()[1], pyarrow.py_buffer(raw)]
    )
    columns = {"question": damaged, "answer": ["1", "2", "3", "4"], "seen": far.cast(pyarrow.timestamp("us"))}
    table, path = pyarrow.table(columns), tmp_path / f"rows.{form}"
    if form == "parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    found = list(read_records([path], FieldsConfig()))
    assert [record.line for record in found if isinstance(record, Record)] == [1, 3]
    assert [(row.line, row.reason) for row in found if isinstance(row, BadRow)] == [
        (2, "not UTF-8: byte 0xe9"),
        (4, "a value that cannot be read (date value out of range)"),
    ]


def test_a_huge_line_is_a_bad_row_and_the_next_one_is_read(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0]).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(good + b'\n{"question": "' + b"x" * (3 * MOST_BYTES) + b'"}\n' + good + b"\n" + good)
    first, huge, third, last = read_records([path], FieldsConfig())
    assert huge == BadRow(str(path), 2, "longer than 10 MiB: split it")
    assert [record.line for record in (first, third, last) if isinstance(record, Record)] == [1, 3, 4]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_huge_row_is_bad_in_parquet_and_arrow_too(tmp_path: Path, form: str) -> None:
    talk = [{"role": "user", "content": "é" * (MOST_BYTES * 3 // 4)}, {"role": "assistant", "content": "b"}]
    fitting = [{"role": "user", "content": "x" * (MOST_BYTES - 100)}, {"role": "assistant", "content": "b"}]
    table = pyarrow.Table.from_pylist([{"messages": found} for found in (talk[1:], talk, fitting)])
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    (_, first), huge, (_, last) = rows(path)
    assert huge == (2, "longer than 10 MiB: split it")
    assert isinstance(first, dict)
    assert isinstance(last, dict)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_memory_is_bounded_by_the_line_not_by_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    line = json.dumps({"question": "x" * 1_000_000, "answer": "y"}).encode() + b"\n"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(300):
            stream.write(line)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in rows(path)) == 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # of 300 MB
