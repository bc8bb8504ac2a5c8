"""A run's data in one call, and the fingerprint that names it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asft_nemo.config.schema import DataConfig, FieldsConfig, RunConfig, from_dict
from asft_nemo.data import BadRow, fingerprint, prepare, read_records
from asft_nemo.data.fingerprint import template_fingerprint
from asft_nemo.data.preparation import prepare_files
from asft_nemo.errors import DataError

Writer = Callable[..., Path]
ROWS = [{"instruction": f"add {i} and 1", "response": f"The answer is {i + 1}."} for i in range(10)]


def run_of(folder: Path, **data: Any) -> RunConfig:
    return from_dict(
        {
            "recipe": "test",
            "objective": {"name": "sft"},
            "reference": {"form": "none"},
            "peft": {"name": "none"},
            "cluster": {"name": "local"},
            "model": {"path": str(folder)},
            "data": {"sequence_length": 96, **data},
            "trainer": {"global_batch_size": 4, "epochs": 2},
        }
    )


def test_prepare_gives_datasets_steps_and_a_summary(tokenizer_dirs: dict[str, Path], jsonl: Writer) -> None:
    folder = tokenizer_dirs["gpt2_like"]
    train, held_out = jsonl(*ROWS), jsonl(*ROWS[:3], name="held_out.jsonl")
    run = run_of(folder, train=[str(train)], validation=[str(held_out)], template="raw")
    prepared = prepare(run, tokenizer_dir=folder)
    assert len(prepared.train) == 10
    assert prepared.validation is not None
    assert len(prepared.validation) == 3
    assert prepared.max_steps == 5
    assert "10 rows, 10 examples" in prepared.summary
    assert "5 steps x 4 examples = 2.00 epochs" in prepared.summary
    assert prepared.fingerprint == prepare(run, tokenizer_dir=folder).fingerprint
    alone = prepare(run_of(folder, train=[str(train)], template="raw"), tokenizer_dir=folder)
    assert alone.validation is None
    assert alone.fingerprint != prepared.fingerprint


def test_prepare_blends_and_says_how_often_each_file_is_seen(
    tokenizer_dirs: dict[str, Path], jsonl: Writer
) -> None:
    folder = tokenizer_dirs["gpt2_like"]
    files = [str(jsonl(*ROWS, name="large.jsonl")), str(jsonl(*ROWS[:4], name="small.jsonl"))]
    run = run_of(folder, train=files, weights=[1, 3], template="raw")
    said = prepare(run, tokenizer_dir=folder).summary
    assert said.endswith(
        "7 steps x 4 examples = 2.00 epochs; blend by samples: large 10 examples, weight 0.25, 0.70 epochs; "
        "small 4 examples, weight 0.75, 5.25 epochs"
    )
    stopping = run_of(folder, train=files, weights=[1, 3], when_exhausted="stop", template="raw")
    assert prepare(stopping, tokenizer_dir=folder).max_steps == 2


def test_prepare_says_what_was_left_out(tokenizer_dirs: dict[str, Path], jsonl: Writer) -> None:
    folder = tokenizer_dirs["gpt2_like"]
    long = {"instruction": "add", "response": "The answer is 42. " * 30}
    run = run_of(folder, train=[str(jsonl(*ROWS, long, "oops"))], template="raw", on_bad_row="skip")
    assert "12 rows, 10 examples (1 bad, 1 too long: left out)" in prepare(run, tokenizer_dir=folder).summary


def test_no_training_file_is_an_error(tokenizer_dirs: dict[str, Path]) -> None:
    folder = tokenizer_dirs["gpt2_like"]
    with pytest.raises(DataError, match=r"data\.train is empty"):
        prepare(run_of(folder), tokenizer_dir=folder)


def test_fingerprint_follows_content_not_names(
    tokenizer_dirs: dict[str, Path], jsonl: Writer, tmp_path: Path
) -> None:
    one, data = jsonl(*ROWS, name="one.jsonl"), DataConfig()
    folder = tokenizer_dirs["gpt2_like"]
    base = fingerprint([one], data, tokenizer_dir=folder)
    copy = tmp_path / "copy.jsonl"
    shutil.copy(one, copy)
    assert fingerprint([copy], data, tokenizer_dir=folder) == base
    changed_tokenizer = shutil.copytree(folder, tmp_path / "tokenizer")
    (changed_tokenizer / "config.json").write_text("{}")
    assert fingerprint([one], data, tokenizer_dir=changed_tokenizer) == base
    text = (changed_tokenizer / "tokenizer.json").read_text()
    (changed_tokenizer / "tokenizer.json").write_text(text + " ")
    others = [
        fingerprint([one], data, tokenizer_dir=changed_tokenizer),
        fingerprint([jsonl(*ROWS[1:], name="two.jsonl")], data, tokenizer_dir=folder),
        fingerprint([one, one], data, tokenizer_dir=folder),
        *(
            fingerprint([one], dataclasses.replace(data, **change), tokenizer_dir=folder)
            for change in (
                {"template": "raw"},
                {"sequence_length": 9},
                {"loss_on": "all"},
                {"on_too_long": "truncate"},
                {"on_bad_row": "skip"},
                {"fields": FieldsConfig(prompt="q", response="a")},
            )
        ),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_every_setting_that_shapes_items_is_in_the_fingerprint() -> None:
    # A new field of DataConfig must be put into the fingerprint, or here, on purpose.
    in_it = {"template", "fields", "sequence_length", "packing", "loss_on", "on_bad_row", "on_too_long"}
    where_set = {"templates", "validation_templates"}
    by_content = {"train", "validation"}
    order_alone = {"weights", "weights_by", "when_exhausted", "group_by_length"}
    limits = {"max_bad_rows"}  # a run that goes beyond it has no items
    known = in_it | where_set | by_content | order_alone | limits
    assert {field.name for field in dataclasses.fields(DataConfig)} == known


# of ROWS under the default settings and no tokenizer: the checkpoints of older runs hold it
KNOWN_FINGERPRINT = "1725402da33106184ed4af05a4f21c35ad692e75b405627bd8e1821b84d6f8b8"


def test_the_fingerprint_changes_only_where_entries_have_templates_of_their_own(
    jsonl: Writer, tmp_path: Path
) -> None:
    files = [jsonl(*ROWS)]

    def names(**changes: Any) -> tuple[str, str]:
        data = DataConfig(**changes)
        return fingerprint(files, data, tokenizer_dir=tmp_path / "none"), template_fingerprint(data)

    assert names() == (KNOWN_FINGERPRINT, "alpaca, prompt=None, response=None, loss_on=response")
    given = [names(templates=("raw",)), names(templates=("chat",)), names(validation_templates=("raw",))]
    for number in (0, 1):
        assert len({names()[number], *(one[number] for one in given)}) == 4


def test_with_templates_of_their_own_it_counts_which_file_is_in_which_entry(
    tokenizer_dirs: dict[str, Path], jsonl: Writer, tmp_path: Path
) -> None:
    folder = tokenizer_dirs["gpt2_like"]
    one, two, three = (jsonl(*ROWS[i : i + 2], name=f"{i}.jsonl") for i in range(3))

    def together(name: str, *files: Path) -> Path:
        (tmp_path / name).mkdir()
        for file in files:
            shutil.copy(file, tmp_path / name)
        return tmp_path / name

    left, right = together("left", one, two), together("right", two, three)
    prepared = tmp_path / "prepared"
    prepare_files(
        [str(left)],
        DataConfig(),
        tokenizer_dir=folder,
        out=prepared,
        workers=1,
        suites=None,
        progress=lambda *_: None,
    )

    def names(*entries: Path, **changes: Any) -> tuple[str, str]:
        key = "validation" if "validation_templates" in changes else "train"
        data = DataConfig(**{key: tuple(map(str, entries))}, **changes)
        return fingerprint(entries, data, tokenizer_dir=folder), template_fingerprint(data)

    for key in ("templates", "validation_templates"):
        own = {key: ("alpaca", "raw")}
        first, second = names(left, three, **own), names(one, right, **own)
        assert all(a != b for a, b in zip(first, second, strict=True))
        assert names(prepared, three, **own) == first
    assert names(left, three) == names(one, right) == names(one, two, three)
    # one file an entry: as before the numbers of files counted
    assert names(one, two, templates=("alpaca", "raw"))[1].endswith("templates=alpaca/raw, loss_on=response")
    # only the entries that the templates are for
    files = [str(one), str(left)], [str(one), str(one), str(two)]
    data = DataConfig(train=(str(one),), templates=("raw",))
    assert len({fingerprint(entries, data, tokenizer_dir=folder) for entries in files}) == 1


def test_each_entry_has_its_own_template(tokenizer_dirs: dict[str, Path], jsonl: Writer) -> None:
    folder = tokenizer_dirs["gpt2_like"]
    one, two = (str(jsonl(ROWS[0], name=name)) for name in ("one.jsonl", "two.jsonl"))

    def lengths(**data: Any) -> list[int]:
        prepared = prepare(run_of(folder, **data), tokenizer_dir=folder)
        sets = (prepared.train, prepared.validation)
        return [int(length) for items in sets if items is not None for length in items.lengths]

    raw, alpaca = lengths(train=[one, two], templates=["raw", "alpaca"])
    assert raw < alpaca
    assert lengths(train=[one], validation=[one, two], validation_templates=["alpaca", "raw"]) == [
        alpaca,
        alpaca,
        raw,
    ]
    assert lengths(train=[one], validation=[two], templates=["raw"]) == [raw, alpaca]
    with pytest.raises(DataError, match="names 1 templates for 2 entries"):
        lengths(train=[one, two], templates=["raw"])


def test_real_gsm8k_has_no_bad_row() -> None:
    file = Path(os.environ.get("ASFT_DATA_DIR", "../shared/data")) / "math" / "gsm8k_train.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is absent: set ASFT_DATA_DIR")
    rows = list(read_records([file], FieldsConfig(prompt="question", response="answer")))
    assert len(rows) == 7473
    assert not any(isinstance(row, BadRow) for row in rows)
