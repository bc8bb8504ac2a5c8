"""Every line of a file becomes a record or a reason with file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asft_nemo.config.schema import DataConfig, FieldsConfig
from asft_nemo.data import BadRow, Record, domain_names, read_records
from asft_nemo.data.files import lines, parse
from asft_nemo.data.sources import refuse_bad_rows
from asft_nemo.errors import DataError

FIELDS = FieldsConfig(prompt="q", response="a")
Writer = Callable[..., Path]

BAD = [
    ('{"q": "x", "a": }', "not JSON: Expecting value at column 17"),
    ('{"q": "x"', "not JSON"),
    ("nonsense", "not JSON"),
    (b'{"q": "\xff", "a": "y"}\n', "not UTF-8: byte 0xff at column 8"),
    ('["x", "y"]', "a JSON array where one object a line is needed"),
    ("3", "a JSON number where an object is needed"),
    ({"question": "x", "a": "y"}, "no field 'q', its fields are a, question: set data.fields.prompt"),
    ({"q": "x", "answer": "y"}, "no field 'a', its fields are answer, q: set data.fields.response"),
    ({}, "no field 'q', its fields are none"),
    ({"q": "x", "a": ""}, "field 'a' is empty"),
    ({"q": "x", "a": " \n\t"}, "field 'a' is empty"),
    ({"q": "", "a": "y"}, "field 'q' is empty"),
    ({"q": "x", "a": None}, "field 'a' is null where text is needed"),
    ({"q": "x", "a": 3}, "field 'a' is number where text is needed"),
    ({"q": ["x"], "a": "y"}, "field 'q' is array where text is needed"),
    ('{"q": "x", "a": NaN}', "field 'a' is number where text is needed"),
    ('{"q": "\\ud800", "a": "y"}', "field 'q' holds half of a surrogate pair"),
    ("[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_row_is_located_and_explained(jsonl: Writer, row: object, reason: str) -> None:
    path = jsonl({"q": "1", "a": "2"}, row, {"q": "3", "a": "4"})
    first, bad, last = read_records([path], FIELDS)
    assert isinstance(first, Record)
    assert isinstance(last, Record)
    assert (first.conversation.pair(), first.file, first.line, first.domain) == (("1", "2"), str(path), 1, 0)
    assert (last.conversation.pair(), last.file, last.line, last.domain) == (("3", "4"), str(path), 3, 0)
    assert isinstance(bad, BadRow)
    assert (bad.file, bad.line) == (str(path), 2)
    assert reason in bad.reason
    assert str(bad) == f"{path}:2: {bad.reason}"


def test_files_keep_their_order_and_blank_lines_their_numbers(jsonl: Writer) -> None:
    one = jsonl("", {"q": "1", "a": "2"}, " ", {"q": "3", "a": "4"}, name="one.jsonl")
    two = jsonl({"q": "5", "a": "6"}, name="two.jsonl")
    records = list(read_records([two, one], FIELDS))
    assert [(Path(record.file).name, record.line) for record in records] == [
        ("two.jsonl", 1),
        ("one.jsonl", 2),
        ("one.jsonl", 4),
    ]


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["data/math.jsonl", "code.v2.jsonl"], ("math", "code.v2")),
        (["/d/math/train.jsonl", "/d/code/train.jsonl", "x.jsonl"], ("math/train", "code/train", "x")),
        (["a.jsonl", "a.jsonl", "b/a.jsonl", "a-2.jsonl"], ("a", "a-2", "b/a", "a-2-2")),
        (["a.jsonl", "a.json"], ("a", "a-2")),
        (["1/d/a.jsonl", "2/d/a.jsonl", "2/e/a.jsonl"], ("1/d/a", "2/d/a", "e/a")),
        ([], ()),
    ],
)
def test_domain_names_are_short_and_apart(files: list[str], names: tuple[str, ...]) -> None:
    assert domain_names(files) == names
    assert len(set(names)) == len(files)


def test_byte_order_mark_carriage_returns_and_missing_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"q": "1", "a": "2"}\r\n{"q": "3", "a": "4"}')
    assert [record.conversation.pair()[1] for record in read_records([path], FIELDS)] == ["2", "4"]  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"q": "x"}'.encode("utf-16"), "UTF-16"),
        ('{"q": "x"}'.encode("utf-32"), "UTF-32"),
        ('{"q": "x"}\n'.encode("utf-16-le"), "UTF-16"),
        ('{"q": "x"}\n'.encode("utf-16-be"), "UTF-16"),
        ('{"q": "x"}\n'.encode("utf-32-be"), "UTF-32"),
        (gzip.compress(b'{"q": "x"}' * 99)[:-12], "is cut off or damaged"),
        (gzip.compress('{"q": "x"}'.encode("utf-16")), "UTF-16"),
        (b"\x1f\x8bnonsense", "is cut off or damaged"),
        (b"\x28\xb5\x2f\xfdnonsense", "is cut off or damaged"),
        (b"PAR1....", "is cut off or damaged"),
        (b"PK\x03\x04", "is zip"),
        (b'[{"q": "x", "a": "y"}]', "is one JSON array"),
        (b'[\n{"q": "x", "a": "y"}]', "is one JSON array"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
    ],
)
def test_a_file_that_is_no_jsonl_is_refused_whole(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(read_records([path], FIELDS))


def test_missing_file_names_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        list(read_records([tmp_path / "nowhere.jsonl"], FIELDS))
    with pytest.raises(DataError, match="holds no data file"):
        list(read_records([tmp_path], FIELDS))


def test_error_lists_twenty_rows_and_counts_all() -> None:
    rows = [BadRow("f", line, "why") for line in range(1, 26)]
    with pytest.raises(DataError) as caught:
        refuse_bad_rows(rows, DataConfig())
    message = str(caught.value)
    assert message.startswith("25 bad rows: correct them, or set data.on_bad_row=skip")
    assert "f:20: why" in message
    assert "f:21" not in message
    assert "and 5 more" in message
    with pytest.raises(DataError, match=r"^1 bad row:"):
        refuse_bad_rows(rows[:1], DataConfig())
    refuse_bad_rows([], DataConfig())


def test_no_more_than_max_bad_rows_are_skipped() -> None:
    rows = [BadRow("f", line, "why") for line in range(1, 26)]
    refuse_bad_rows(rows, DataConfig(on_bad_row="skip", max_bad_rows=25))
    with pytest.raises(
        DataError,
        match=r"^25 bad rows are more than data\.max_bad_rows=24: .* or raise data\.max_bad_rows\n  f:1: why",
    ):
        refuse_bad_rows(rows, DataConfig(on_bad_row="skip", max_bad_rows=24))


@given(st.binary(max_size=60))
def test_no_line_of_bytes_raises(raw: bytes) -> None:
    parsed = parse(raw)
    assert isinstance(parsed, (dict, str))


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=9)), min_size=1, max_size=5))
def test_written_rows_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows))
    with path.open("rb") as stream:
        assert [json.loads(raw) for _, raw in lines(stream, path)] == rows
