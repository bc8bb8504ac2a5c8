"""Files and folders that are well written and say nonsense, and the sentences they are refused with."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from asft_nemo.config.hub_ids import HubId
from asft_nemo.data import TextTokenizer, hub
from asft_nemo.data.download import RECORD, download
from asft_nemo.data.files import expand, rows
from asft_nemo.data.inspection import histogram
from asft_nemo.data.manifest import MANIFEST, read_manifest
from asft_nemo.data.packing import PackedDataset
from asft_nemo.data.published import PublishedFile, Web
from asft_nemo.errors import DataError


def refusal(call: Any, *given: Any, **named: Any) -> str:
    with pytest.raises(DataError) as refused:
        call(*given, **named)
    return str(refused.value)


def fetch(file: PublishedFile, out: Path) -> Any:
    return download([file], out, progress=lambda done, total, name: None)


def test_a_number_of_thousands_of_digits_is_no_json_that_is_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": ' + "1" * 5000 + "}\n")
    ((_, row),) = rows(file)
    assert row == "not JSON that can be read: a number is too long"


def test_a_stream_of_arrow_that_breaks_off_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "rows.arrow"
    table = pyarrow.table({"prompt": ["a"] * 1000, "response": ["b"] * 1000})
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert len(list(rows(file))) == 1000
    file.write_bytes(file.read_bytes()[:700])
    said = refusal(list, rows(file))
    assert said.startswith(f"data file {file} is cut off or damaged (")


@pytest.mark.parametrize("state", ["{", "[]", '{"_data_files": [{}]}', '{"_data_files": [3]}'])
def test_a_saved_dataset_whose_list_says_nothing(tmp_path: Path, state: str) -> None:
    (tmp_path / "state.json").write_text(state)
    said = refusal(expand, str(tmp_path))
    assert said == f"{tmp_path / 'state.json'} is not what save_to_disk writes: save the dataset again"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"format": "another"}, "{file} is none that asft data prepare wrote: correct data.train"),
        ({"format": None, "version": 0}, "{file} is none that asft data prepare wrote: correct data.train"),
    ],
)
def test_a_manifest_of_somebody_else(tmp_path: Path, value: dict[str, Any], said: str) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(value))
    assert refusal(read_manifest, tmp_path) == said.format(file=tmp_path / MANIFEST)


def test_a_download_that_no_disk_holds_is_not_begun(tmp_path: Path) -> None:
    file = PublishedFile("x.jsonl", Web("http://127.0.0.1:9/x.jsonl"), None, 2**60)
    said = refusal(fetch, file, tmp_path)
    assert said.startswith("x.jsonl has 1099511627776 MiB, but there are only ")
    assert said.endswith(f" MiB free in {tmp_path}: make room")
    assert not (tmp_path / "x.jsonl.part").exists()


def test_damaged_digests_of_downloads_are_named(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text("{")
    file = PublishedFile("x.jsonl", Web("http://127.0.0.1:9/x.jsonl"), None, None)
    said = refusal(fetch, file, tmp_path)
    assert said == f"{tmp_path / RECORD} is damaged: delete it, and with it the digests of first downloads"


def test_a_dataset_without_files_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a script made in memory have no file to read again."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(hub, "_cached", lambda found: datasets.Dataset.from_dict({"prompt": ["a"]}))
    said = refusal(hub.hub_files, "owner/name", HubId("owner/name", None, "train"))
    expected = "owner/name is no dataset of rows in files: save it (save_to_disk) and name the directory"
    assert said == expected


def test_a_slow_tokenizer_is_refused() -> None:
    """Only tokenizer.json gives the characters of each token."""
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    slow.name_or_path = "somewhere"
    said = refusal(TextTokenizer, slow)
    assert said == (
        "the tokenizer in somewhere has no tokenizer.json, which gives character offsets: convert it"
    )


def test_no_lengths_make_no_histogram() -> None:
    assert histogram(Counter(), 100) == []


def test_a_packed_dataset_is_asked_for_nothing_private() -> None:
    """Copying and pickling ask a half-made object for such names."""
    empty = PackedDataset.__new__(PackedDataset)
    for name in ("_missing", "examples"):
        with pytest.raises(AttributeError, match=name):
            getattr(empty, name)
