"""A prepared directory gives the run that the raw files give; it is made once, whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import gzip
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

from asft_nemo.config.schema import DataConfig, RunConfig, from_dict
from asft_nemo.data import PackedDataset, SupervisedDataset, TextTokenizer, Tokenized, prepare
from asft_nemo.data.contamination import EvaluationIndex
from asft_nemo.data.digests import digest
from asft_nemo.data.fingerprint import files_fingerprint
from asft_nemo.data.preparation import Result, Suites, prepare_files
from asft_nemo.data.store import Part, PartWriter
from asft_nemo.data.workers import Setup, tasks
from asft_nemo.errors import DataError

Writer = Callable[..., Path]
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "adds",
    "two",
    "numbers",
    "and",
    "writes",
    "the",
    "answer",
    "東京",
    "é",
    "42",
    "7",
]


def row(number: int) -> dict[str, str]:
    """Rows of different lengths."""
    return {
        "instruction": " ".join(WORDS[(number * 7 + i) % len(WORDS)] for i in range(1 + number % 13)),
        "response": " ".join(WORDS[(number * 5 + i) % len(WORDS)] for i in range(1 + number % 17)),
    }


ROWS = [row(number) for number in range(60)]
BAD = ["oops", {"instruction": "a"}, {"frage": "b"}]
TALK = {
    "messages": [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "The answer is 42."},
        {"role": "user", "content": "two numbers"},
        {"role": "assistant", "content": "The answer is 7."},
    ]
}


@pytest.fixture
def model(tokenizer_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A model's directory with a chat template."""
    folder = shutil.copytree(tokenizer_dirs["gpt2_like"], tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a file, each recorded as done."""
    monkeypatch.setattr("asft_nemo.data.workers._CHUNK_ROWS", 7)
    monkeypatch.setattr("asft_nemo.data.files._BATCH", 5)
    monkeypatch.setattr("asft_nemo.data.store._SAVE_SECONDS", 0.0)


def made(
    model: Path,
    out: Path,
    *files: Path,
    workers: int = 1,
    suites: Suites | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    **data: Any,
) -> Result:
    return prepare_files(
        files,
        DataConfig(**data),
        tokenizer_dir=model,
        out=out,
        workers=workers,
        suites=suites,
        progress=progress,
    )


def run_of(model: Path, train: Sequence[Path], validation: Sequence[Path] = (), **data: Any) -> RunConfig:
    files = {"train": [str(file) for file in train], "validation": [str(file) for file in validation]}
    return from_dict(
        {
            "recipe": "test",
            "objective": {"name": "sft"},
            "reference": {"form": "none"},
            "peft": {"name": "none"},
            "cluster": {"name": "local"},
            "model": {"path": str(model)},
            "data": {"sequence_length": 64, "template": "raw", **files, **data},
            "trainer": {"global_batch_size": 4, "epochs": 2},
        }
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def assert_same_items(
    ours: SupervisedDataset | PackedDataset | None, theirs: SupervisedDataset | PackedDataset | None
) -> None:
    assert ours is not None
    assert theirs is not None
    assert len(ours) == len(theirs) > 0
    assert vars(ours.report) == vars(theirs.report)
    assert ours.sample_ids.tolist() == theirs.sample_ids.tolist()
    for index in (*range(len(ours)), -1):
        mine, other = ours[index], theirs[index]
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert value.dtype == other[name].dtype
            assert torch.equal(value, other[name]), (index, name)


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


def killed_at(call: int) -> Callable[..., None]:
    """A progress callback that ends the process as an operator or the system's memory guard does."""
    calls = 0

    def show(done: int, total: int, name: str) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)

    return show


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_is_gone_on_with(model: Path, jsonl: Writer, tmp_path: Path, workers: int) -> None:
    files = [jsonl(*BAD, *ROWS[:20], name="1.jsonl"), jsonl(*ROWS[20:], name="2.jsonl")]
    settings: dict[str, Any] = {"template": "raw", "on_bad_row": "skip", "workers": workers}
    whole = made(model, tmp_path / "whole", *files, **settings)
    out, rounds, seen = tmp_path / "out", 0, []
    fork = multiprocessing.get_context("fork")

    def recorded() -> list[Path]:
        return [*out.glob("parts/*/part.json"), *out.glob("unfinished/*/progress.json")]

    while not (out / "manifest.json").exists():
        process = fork.Process(
            target=made, args=(model, out, *files), kwargs={"progress": killed_at(3), **settings}
        )
        process.start()
        process.join(30)
        assert process.exitcode in (0, -signal.SIGKILL)
        rounds += 1
        assert rounds < 10
        seen.append(sum(json.loads(path.read_text())["counts"]["rows"] for path in recorded()))
    assert rounds >= 3
    assert seen[:-1] == sorted(set(seen[:-1]))  # every round comes further; the last one writes the manifest
    assert whole.manifest.total().rows == 63
    assert contents(out) == contents(tmp_path / "whole")


def test_what_was_written_after_the_last_record_is_written_again(
    model: Path, jsonl: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a chunk on disk, as a kill between two writes leaves it."""
    file, out = jsonl(*ROWS), tmp_path / "out"
    made(model, tmp_path / "whole", file)
    appended, whole = 0, PartWriter.append

    def half(self: PartWriter, chunk: Any) -> None:
        nonlocal appended
        appended += 1
        if appended == 4:
            self._streams["tokens.bin"].write(b"123")
            self._streams["tokens.bin"].flush()
            raise KeyboardInterrupt
        whole(self, chunk)

    monkeypatch.setattr(PartWriter, "append", half)
    with pytest.raises(KeyboardInterrupt):
        made(model, out, file)
    assert not (out / "manifest.json").exists()
    monkeypatch.setattr(PartWriter, "append", whole)
    done: list[int] = []
    made(model, out, file, progress=lambda bytes_done, total, name: done.append(bytes_done))
    assert len(done) == 9 - 3 + 1  # chunks of 60 rows in sevens, less those recorded, and the end
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("ends", ["refused", "killed"])
def test_rows_of_other_bytes_are_not_gone_on_with(
    model: Path, jsonl: Writer, tmp_path: Path, ends: str
) -> None:
    """A file is overwritten after its digest was taken and restored, its time too, after the run has ended."""
    file, other, out = jsonl(*ROWS), jsonl(*ROWS[::-1], name="other.jsonl"), tmp_path / "out"
    whole = made(model, tmp_path / "whole", file)
    before, times = file.read_bytes(), file.stat()
    set_back = (times.st_atime_ns, times.st_mtime_ns)
    read_as_other = 0

    def overwrite(done: int, total: int, name: str) -> None:
        nonlocal read_as_other
        read_as_other += 1
        if ends == "killed" and read_as_other == 3:
            raise KeyboardInterrupt

    def digest_then_overwrite(path: Path) -> bytes:
        found = digest(path)
        path.write_bytes(other.read_bytes())
        if ends == "killed":
            os.utime(path, ns=set_back)  # not even the time shows it
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asft_nemo.data.preparation.digest", digest_then_overwrite)
        expected = KeyboardInterrupt if ends == "killed" else DataError
        with pytest.raises(expected, match=None if ends == "killed" else "has changed while it was read"):
            made(model, out, file, progress=overwrite)
    assert read_as_other >= 3
    assert bool(list(out.glob("unfinished/*/progress.json"))) == (ends == "killed")
    time.sleep(0.02)  # more than the file system's tick
    file.write_bytes(before)
    os.utime(file, ns=set_back)
    assert made(model, out, file).manifest.total() == whole.manifest.total()
    assert contents(out) == contents(tmp_path / "whole")


def test_a_tokenising_process_that_ends_by_itself_is_an_error(
    model: Path, jsonl: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asft_nemo.data.workers.Setup.__call__", lambda self, task: os._exit(9))
    with pytest.raises(DataError, match=r"a tokenising process ended by itself, .* with fewer --workers"):
        made(model, tmp_path / "out", jsonl(*ROWS), workers=2)


def test_only_one_call_writes_at_a_time(model: Path, jsonl: Writer, tmp_path: Path) -> None:
    file, out = jsonl(*ROWS[:9]), tmp_path / "out"
    made(model, out, file)
    with (out / ".lock").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another asft data prepare is writing to"):
            made(model, out, file)
    assert made(model, out, file).unchanged


def test_an_error_of_the_system_names_what_it_is_about(
    model: Path, jsonl: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(done: int, total: int, name: str) -> None:
        (tmp_path / name).unlink(missing_ok=True)

    def fails(number: int) -> Callable[..., None]:
        def call(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        return call

    file, out = jsonl(*ROWS), tmp_path / "out"
    with pytest.raises(DataError, match=rf"^data file {file} cannot be read \(No such file .*: put it back$"):
        made(model, out, file, progress=gone)
    file = jsonl(*ROWS)
    with monkeypatch.context() as patch:
        for number in (errno.ENOSYS, errno.ENOTSUP):
            patch.setattr("fcntl.flock", fails(number))
            with pytest.raises(
                DataError, match=f"the file system of {out} has no locks .*: give another --out"
            ):
                made(model, out, file)
    with monkeypatch.context() as patch:
        patch.setattr("os.fork", fails(errno.EAGAIN))
        with pytest.raises(DataError, match=r"3 tokenising processes cannot be started .* fewer --workers"):
            made(model, out, file, workers=3)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fails(errno.ENOSPC))
        with pytest.raises(DataError, match=f"{out} cannot be written .*No space left.*: free space there"):
            made(model, out, file)
    assert made(model, out, file).manifest.total().rows == 60


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


@pytest.mark.parametrize("name", ["tokens.bin", "spans.bin", "index.bin", "part.json"])
def test_a_damaged_part_is_named_and_made_again(
    model: Path, jsonl: Writer, tmp_path: Path, name: str
) -> None:
    file, out, tokenizer = jsonl(*ROWS[:9]), tmp_path / "out", TextTokenizer.load(model)
    made(model, out, file)
    [path] = out.rglob(name)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"{path} (has|is).*: run asft data prepare again"):
        SupervisedDataset.from_files([out], DataConfig(), tokenizer=tokenizer)
    assert made(model, out, file).made == 1
    SupervisedDataset.from_files([out], DataConfig(), tokenizer=tokenizer)


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
