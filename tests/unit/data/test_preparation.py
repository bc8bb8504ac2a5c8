"""A prepared directory gives the run that the raw files give; it is made once, whole or not at all."""

from __future__ import annotations

import dataclasses
import gzip
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from preparing import BAD, ROWS, TALK, Writer, assert_same_items, contents, made, row, run_of
from pyarrow import parquet

from asft_nemo.config.schema import DataConfig
from asft_nemo.data import SupervisedDataset, TextTokenizer, prepare
from asft_nemo.data.contamination import EvaluationIndex
from asft_nemo.data.fingerprint import files_fingerprint
from asft_nemo.data.preparation import Suites
from asft_nemo.data.store import Part
from asft_nemo.errors import DataError

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"template": "alpaca", "sequence_length": 200},
        {"sequence_length": 24, "on_too_long": "truncate"},
        {"sequence_length": 24, "on_too_long": "truncate", "loss_on": "all"},
        {"loss_on": "all", "packing": True},
        {"template": "chat", "loss_on": "all_assistant"},
        {"templates": ["raw", "alpaca", "raw"], "validation_templates": ["alpaca"], "sequence_length": 200},
    ],
    ids=str,
)
def test_a_run_from_the_prepared_form_is_the_run_from_the_files(
    model: Path, jsonl: Writer, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Items, ids, order of domains, report, steps, summary, both fingerprints; one entry stays raw."""
    settings = {"on_bad_row": "skip", **settings}
    first = [jsonl(*BAD, *ROWS[:20], name="a.jsonl"), jsonl(*ROWS[20:25], BAD[1], name="b.jsonl")]
    raw, third, held_out = (jsonl(*ROWS[start::9], name=f"{start}.jsonl") for start in (3, 4, 5))
    both = shutil.copytree(
        tmp_path, tmp_path / "both", ignore=lambda _, names: set(names) - {"a.jsonl", "b.jsonl"}
    )
    files = [both, raw, third]
    templates = settings.get("templates") or [settings.get("template", "raw")] * 3
    common = {"loss_on": settings.get("loss_on", "response"), "on_bad_row": "skip"}
    made(model, tmp_path / "p" / "1", both, template=templates[0], **common)
    made(model, tmp_path / "p" / "2", third, template=templates[2], **common)
    validation = (settings.get("validation_templates") or [templates[0]])[0]
    made(model, tmp_path / "p" / "v", held_out, template=validation, **common)
    shutil.rmtree(both)  # training does not need the files any more
    for file, name in zip(first, ("a.jsonl", "b.jsonl"), strict=True):
        both.mkdir(exist_ok=True)
        shutil.copy(file, both / name)
    expected = prepare(run_of(model, files, [held_out], **settings), tokenizer_dir=model)
    places = [tmp_path / "p" / "1", raw, tmp_path / "p" / "2"]
    found = prepare(run_of(model, places, [tmp_path / "p" / "v"], **settings), tokenizer_dir=model)
    assert found.fingerprint == expected.fingerprint
    assert (found.max_steps, found.summary) == (expected.max_steps, expected.summary)
    assert files_fingerprint(places) == files_fingerprint(files)
    assert_same_items(found.train, expected.train)
    assert_same_items(found.validation, expected.validation)


def test_every_format_and_number_of_processes_gives_the_same_parts(
    model: Path, jsonl: Writer, tmp_path: Path
) -> None:
    lines = jsonl(BAD[2], *ROWS[:30], TALK)
    packed, table = tmp_path / "rows.jsonl.gz", tmp_path / "rows.parquet"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:30]), table)
    files = [lines, packed, table]
    alone = made(model, tmp_path / "one", *files, template="raw", on_bad_row="skip")
    shared = made(model, tmp_path / "three", *files, template="raw", on_bad_row="skip", workers=3)
    assert alone.manifest.total() == shared.manifest.total()
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    parts = [Part(tmp_path / "one" / "parts" / source.part) for source in alone.manifest.sources]
    assert parts[0].tokens.tolist() == parts[1].tokens.tolist() == parts[2].tokens.tolist()
    assert [part.counts.bad for part in parts] == [2, 2, 0]


def test_a_second_call_does_nothing_and_a_changed_file_is_done_alone(
    model: Path, jsonl: Writer, tmp_path: Path
) -> None:
    one, two, out = jsonl(*ROWS[:9], name="1.jsonl"), jsonl(*ROWS[9:20], name="2.jsonl"), tmp_path / "out"
    assert not made(model, out, one, two).unchanged
    before = contents(out)
    again = made(model, out, one, two)
    assert (again.unchanged, again.made, again.used_again) == (True, 0, 2)
    assert contents(out) == before
    two.write_text(one.read_text() + two.read_text())
    changed = made(model, out, one, two)
    assert (changed.unchanged, changed.made, changed.used_again) == (False, 1, 1)
    assert changed.manifest.total().rows == 9 + 20
    assert len(list((out / "parts").iterdir())) == 2  # the old part is gone
    added = made(model, out, one, two, jsonl(*ROWS[9:20], name="3.jsonl"))
    assert (added.made, added.used_again) == (1, 2)
    other = made(model, out, one, two, template="raw")
    assert (other.made, other.used_again) == (2, 0)


def test_two_files_of_the_same_bytes_are_one_part(model: Path, jsonl: Writer, tmp_path: Path) -> None:
    one, two, out = jsonl(*ROWS[:9], name="1.jsonl"), jsonl(*ROWS[:9], name="2.jsonl"), tmp_path / "out"
    assert made(model, out, one, two).made == 1
    tokenizer, data = TextTokenizer.load(model), DataConfig()
    assert_same_items(
        SupervisedDataset.from_files([out], data, tokenizer=tokenizer),
        SupervisedDataset.from_files([str(tmp_path / "?.jsonl")], data, tokenizer=tokenizer),
    )


def test_a_directory_of_something_else_is_refused(model: Path, jsonl: Writer, tmp_path: Path) -> None:
    file, other = jsonl(*ROWS[:9]), tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    for out, reason in ((other, "holds something else"), (file, "is a file")):
        with pytest.raises(DataError, match=reason):
            made(model, out, file)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_bad_rows_are_an_error_after_all_files_and_skipping_them_needs_no_second_reading(
    model: Path, jsonl: Writer, tmp_path: Path
) -> None:
    files = [jsonl(*ROWS[:9], BAD[0], name="1.jsonl"), jsonl(*ROWS[9:20], BAD[1], name="2.jsonl")]
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"^2 bad rows: correct them, or set data\.on_bad_row=skip") as caught:
        made(model, out, *files)
    assert f"{files[0]}:10: not JSON" in str(caught.value)
    assert f"{files[1]}:12: no field 'response'" in str(caught.value)
    assert not (out / "manifest.json").exists()
    with pytest.raises(DataError, match=r"2 bad rows are more than data\.max_bad_rows=1"):
        made(model, out, *files, on_bad_row="skip", max_bad_rows=1)
    skipped = made(model, out, *files, on_bad_row="skip")
    assert (skipped.made, skipped.used_again) == (0, 2)
    tokenizer = TextTokenizer.load(model)
    with pytest.raises(DataError, match=r"^2 bad rows"):  # as from the files
        SupervisedDataset.from_files([out], DataConfig(), tokenizer=tokenizer)
    with pytest.raises(DataError, match="no row is left of 1: 1 are bad"):
        made(model, tmp_path / "none", jsonl("oops"), on_bad_row="skip")


def test_evaluation_questions_are_left_out_and_counted(model: Path, jsonl: Writer, tmp_path: Path) -> None:
    question = "a b c d e f g h i j k l m n"
    file = jsonl(*ROWS[:9], {"instruction": f"So: {question}", "response": "42"}, *ROWS[9:20])
    index = EvaluationIndex({"suite": [question]})
    clean, whole = tmp_path / "clean", tmp_path / "whole"
    result = made(model, clean, file, suites=Suites(("suite",), index, "00"))
    assert (result.manifest.total().rows, result.manifest.total().contaminated) == (21, 1)
    part = Part(clean / "parts" / result.manifest.sources[0].part)
    assert list(part.left_out("contaminated.txt")) == [
        (9, 10, "shares 13 words in a row with row 1 of suite")
    ]
    made(model, whole, file)
    one, two = (
        prepare(run_of(model, [p], template="alpaca", sequence_length=200), tokenizer_dir=model)
        for p in (clean, whole)
    )
    assert one.fingerprint != two.fingerprint
    assert files_fingerprint([clean]) != files_fingerprint([whole]) == files_fingerprint([file])
    assert one.train.sample_ids.tolist() == [number for number in range(21) if number != 9]
    assert "21 rows, 20 examples (1 with evaluation questions: left out)" in one.summary
    assert made(model, clean, file, suites=Suites(("suite",), index, "01")).made == 1


def test_what_contradicts_the_manifest_is_named(model: Path, jsonl: Writer, tmp_path: Path) -> None:
    out, data = tmp_path / "out", DataConfig(template="raw")
    made(model, out, jsonl(*ROWS[:9]), template="raw")

    def refused(folder: Path, data: DataConfig, reason: str) -> None:
        with pytest.raises(DataError, match=reason):
            SupervisedDataset.from_files([out], data, tokenizer=TextTokenizer.load(folder))

    refused(
        model,
        DataConfig(),
        "prepared with data.template=raw and the run has data.template=alpaca: .*set data.template=raw",
    )
    refused(
        model,
        dataclasses.replace(data, loss_on="all"),
        "data.loss_on=response and the run has data.loss_on=all",
    )
    (model / "chat_template.jinja").write_text("")  # which raw does not read
    SupervisedDataset.from_files([out], data, tokenizer=TextTokenizer.load(model))
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(text + " ")
    refused(
        model,
        data,
        "a tokenizer whose tokenizer.json differs .* run asft data prepare again with model.path=",
    )
    (out / "manifest.json").write_text((out / "manifest.json").read_text()[:-9])
    refused(model, data, "manifest.json cannot be read or is damaged: run asft data prepare again")


def test_prepared_directories_are_no_files_to_prepare(model: Path, jsonl: Writer, tmp_path: Path) -> None:
    made(model, tmp_path / "out", jsonl(*ROWS[:9]))
    with pytest.raises(
        DataError, match=r"was written by asft data prepare .* give the files it was made from"
    ):
        made(model, tmp_path / "other", tmp_path / "out")


def test_a_mapped_dataset_pickles_as_its_place(model: Path, jsonl: Writer, tmp_path: Path) -> None:
    file = jsonl(*(row(number) for number in range(700)))
    made(model, tmp_path / "out", file)
    dataset = SupervisedDataset.from_files(
        [tmp_path / "out"], DataConfig(), tokenizer=TextTokenizer.load(model)
    )
    pickled = pickle.dumps(dataset)
    assert (
        len(pickled)
        < (tmp_path / "out").stat().st_size + 60_000
        < next(tmp_path.rglob("tokens.bin")).stat().st_size
    )
    assert_same_items(pickle.loads(pickled), dataset)
