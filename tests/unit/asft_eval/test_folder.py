"""A result's folder: one process at a time, nothing of it lost without a word, nothing stale left in it."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asft_eval import EvaluationError, asking, drift
from asft_eval.backends.fake import FakeBackend
from asft_eval.drift import DriftRequest
from asft_eval.explain import explain
from asft_eval.folder import LOCK, held
from asft_eval.result import Result, read_result, read_samples, write_result
from asft_eval.run import evaluate
from asft_eval.suites import suite_from_pairs
from asft_eval.types import Suite

from asft_nemo import cli

WORDS = suite_from_pairs("words", [(word, word.upper()) for word in ("ab", "cd", "ef")])
SUMS = suite_from_pairs("sums", [("1+1", "2"), ("2+2", "4")])


def run(model: Path, out: Path, *suites: Suite, **changes: Any) -> Result:
    settings: dict[str, Any] = {"backend": FakeBackend(str.upper), "max_tokens": 8, **changes}
    return evaluate(model, suites, out_dir=out, **settings)


def asked(model: Path, out: Path, *suites: Suite, **changes: Any) -> list[str]:
    """What a run asks the model."""
    backend = FakeBackend(str.upper)
    run(model, out, *suites, backend=backend, **changes)
    return backend.asked


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Interrupted(Exception):
    """Stands for the machine going down."""


def cut_off(model: Path, out: Path, suite: Suite, at: str) -> None:
    def dies(prompt: str) -> str:
        if prompt == at:
            raise Interrupted
        return prompt.upper()

    with pytest.raises(Interrupted):
        run(model, out, suite, backend=FakeBackend(dies))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another model's directory."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text('{"other": 1}')
    return folder


# --- one process at a time ------------------------------------------------------------------------------------


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """One that holds the folder."""
    code = "import sys, pathlib; from asft_eval.folder import held\nwith held(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()
            process.wait(timeout=30)


@pytest.mark.usefixtures("keep_logging_and_warnings")
def test_a_second_process_is_refused_at_once_and_takes_nothing_away(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("words")
    run(model, out, WORDS)
    before = contents(out)
    monkeypatch.setattr(drift, "require_model", lambda *_: None)
    with another_process(out) as process:
        says = rf"out is being written by process {process.pid} on .*: wait until that has ended"
        with pytest.raises(EvaluationError, match=says):
            run(model, out, SUMS, backend=FakeBackend(lambda _: pytest.fail("asked")))
        with pytest.raises(EvaluationError, match=says):
            drift.measure_alone(model, DriftRequest(text=text, base=None), out)
        write_result(out, replace(read_result(out), for_judge={"duel": {}}), read_samples(out))
        assert cli.main(["eval", "judge", str(out), "--judge", str(model)]) == 2
        assert f"is being written by process {process.pid} on" in capsys.readouterr().err
        write_result(out, replace(read_result(out), for_judge={}), read_samples(out))
        assert {**contents(out), LOCK: b""} == {**before, LOCK: b""}
        process.kill()  # the kernel ends the lock, whatever is left of the file
        process.wait(timeout=30)
        assert (out / LOCK).exists()
        run(model, out, WORDS)
    assert contents(out).keys() == before.keys()


def test_one_process_holds_a_folder_once(tmp_path: Path) -> None:
    with held(tmp_path / "new" / "out"):
        with pytest.raises(EvaluationError, match="is being written by process"), held(tmp_path / "new/out"):
            pass
        assert (tmp_path / "new" / "out" / LOCK).exists()
    assert not (tmp_path / "new").exists(), "nothing came into it"


def test_a_file_system_without_locks_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_here(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none_here)
    with caplog.at_level(logging.WARNING):
        run(model, tmp_path / "out", WORDS)
    assert "has no locks: start no second evaluation" in caplog.text
    assert sorted(contents(tmp_path / "out")) == ["results.json", "samples.jsonl"]


@pytest.mark.parametrize("place", ["/proc/x", "/proc/1/fd"])
def test_a_folder_that_cannot_be_written_is_said_before_the_model_runs(model: Path, place: str) -> None:
    with pytest.raises(
        EvaluationError, match=rf"{place} cannot be written \(.+\): give --out a folder of yours"
    ):
        run(model, Path(place), WORDS, backend=FakeBackend(lambda _: pytest.fail("asked")))


def test_a_result_is_not_written_into_a_models_directory(model: Path, other: Path, tmp_path: Path) -> None:
    before = contents(model)
    for out, request in ((model, None), (other, DriftRequest(text=tmp_path / "x", base=other))):
        with pytest.raises(EvaluationError, match="is the directory of the model itself"):
            run(model, out, WORDS, drift=request)
    assert contents(model) == before


# --- written down soon ----------------------------------------------------------------------------------------


class Batches(FakeBackend):
    """Answers come two at a time; before the next two come the file is read."""

    def __init__(self, file: Path):
        super().__init__(str.upper)
        self.file, self.seen = file, list[int]()

    def generate(self, prompts: Any, *, protocol: Any, seeds: Any = (), done: Any) -> Any:
        for start in range(0, len(prompts), 2):
            super().generate(
                prompts[start : start + 2],
                protocol=protocol,
                done=lambda place, answer, start=start: done(start + place, answer),
            )
            until = time.monotonic() + 20
            while (lines := self.file.read_bytes().count(b"\n")) < start + 2 and time.monotonic() < until:
                time.sleep(0.01)
            self.seen.append(lines)


def test_answers_are_written_while_the_next_batch_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_SECONDS_UNWRITTEN", 0.05)
    backend = Batches(tmp_path / "out" / "samples.jsonl")
    four = suite_from_pairs("four", [(x, x.upper()) for x in ("a", "b", "c", "d")])
    found = run(model, tmp_path / "out", four, backend=backend)
    assert backend.seen == [2, 4]
    assert (found.suites["four"].n, found.suites["four"].right) == (4, 4)


def test_a_disk_that_is_full_ends_the_asking(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def slow(prompt: str) -> str:
        calls.append(prompt)
        time.sleep(0.1)
        return prompt

    calls: list[str] = []

    monkeypatch.setattr(asking, "_SECONDS_UNWRITTEN", 0.05)
    monkeypatch.setattr("asft_eval.requests.Journal.add", full)
    backend = FakeBackend(slow)
    with pytest.raises(OSError, match="No space left"):
        run(
            model,
            tmp_path / "out",
            suite_from_pairs("many", [(str(i), "") for i in range(99)]),
            backend=backend,
        )
    assert len(calls) < 99, "an answer that cannot be written ends it"


# --- what is measured again -----------------------------------------------------------------------------------


def test_the_right_answer_is_the_suites_of_today(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, out, suite_from_pairs("words", [("ab", "old"), ("cd", "CD")]))
    assert asked(model, out, suite_from_pairs("words", [("ab", "AB"), ("cd", "CD")])) == []
    assert [(row["answer"], row["correct"]) for row in read_samples(out)] == [("AB", True), ("CD", True)]
    assert "right answer: AB" in explain(out, "1")


def test_files_made_of_former_answers_go(data_dir: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, out, WORDS, SUMS)
    beside = ("judge.json", "sums_evalplus.jsonl", "words_outputs.json", "notes.txt")
    for name in beside:
        (out / name).write_text("{}")
    run(model, out, WORDS)
    assert sorted(contents(out)) == ["notes.txt", "results.json", "samples.jsonl", "sums_evalplus.jsonl"]
    (model / "config.json").write_text('{"trained": "anew"}')
    run(model, out, WORDS)
    assert sorted(contents(out)) == ["notes.txt", "results.json", "samples.jsonl"]


# --- nothing is lost without a word ---------------------------------------------------------------------------


def test_answers_that_a_limit_leaves_out_are_not_asked_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(model, out, WORDS, SUMS)
    assert asked(model, out, WORDS, limit=1) == []
    assert (read_result(out).suites["words"].n, len(read_samples(out))) == (1, 1 + 2)
    assert "correct" not in (out / "other_answers.jsonl").read_text()
    assert asked(model, out, WORDS) == []
    assert read_result(out).suites["words"].n == 3
    assert not (out / "other_answers.jsonl").exists(), "each has its place again"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[:-20], r"results\.json is damaged .*: move that file away"),
        (lambda text: text.replace('"schema_version": 4', '"schema_version": 99'), "schema version 99, .* use the asft that wrote it"),
    ],
)  # fmt: skip
def test_a_result_that_cannot_be_read_is_not_overwritten(
    model: Path, other: Path, tmp_path: Path, damage: Any, says: str
) -> None:
    out = tmp_path / "out"
    run(model, out, WORDS)
    (out / "results.json").write_text(damage((out / "results.json").read_text()))
    before = contents(out)
    for who, suite in ((model, SUMS), (other, WORDS)):
        with pytest.raises(EvaluationError, match=says):
            run(who, out, suite)
    assert contents(out) == before
    (out / "results.json").unlink()
    with pytest.raises(EvaluationError, match="nothing says of which model"):
        run(other, out, WORDS)
    assert asked(model, out, WORDS) == []


def test_what_was_cut_off_is_kept_from_other_suites_and_models(
    model: Path, other: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cut_off(model, out, WORDS, at="ef")
    before = contents(out)
    with pytest.raises(EvaluationError, match=r"of another model \(.*model\): give another --out, or empty"):
        run(other, out, WORDS)
    assert contents(out) == before
    run(model, out, SUMS)
    assert list(read_result(out).suites) == ["sums"]
    assert asked(model, out, WORDS) == ["ef"]
    assert sorted(contents(out)) == ["results.json", "samples.jsonl"]


def test_other_weights_in_the_same_directory_are_said(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    run(model, out, WORDS, SUMS)
    cut_off(model, out, suite_from_pairs("late", [("x", "X"), ("y", "Y")]), at="y")
    (model / "config.json").write_text('{"trained": "anew"}')
    with caplog.at_level(logging.WARNING):
        assert asked(model, out, WORDS) == ["ab", "cd", "ef"]
    assert "holds other weights than when" in caplog.text
    assert "dropped are 6 answers (late, sums, words)" in caplog.text
    assert list(read_result(out).suites) == ["words"]


def test_the_drift_alone_of_other_weights_in_the_same_directory(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, request = tmp_path / "out", DriftRequest(text=tmp_path / "text.txt", base=None)
    run(model, out, WORDS)
    (model / "config.json").write_text('{"trained": "anew"}')
    monkeypatch.setattr(drift, "require_model", lambda *_: None)
    monkeypatch.setattr(drift, "measure", lambda *_: {"tokens": 7})
    with caplog.at_level(logging.WARNING):
        found = drift.measure_alone(model, request, out)
    assert "dropped are 3 answers (words)" in caplog.text
    assert (found.suites, found.drift, read_samples(out)) == ({}, {"tokens": 7}, [])


def test_the_same_name_at_another_address_is_refused(tmp_path: Path) -> None:
    def behind(address: str) -> FakeBackend:
        backend = FakeBackend(str.upper)
        backend.fingerprint = address  # type: ignore[attr-defined]
        return backend

    out = tmp_path / "out"
    run(Path("referee"), out, WORDS, backend=behind("a"))
    before = contents(out)
    with pytest.raises(
        EvaluationError, match=r"referee behind another address, .*: give the --base-url of before"
    ):
        run(Path("referee"), out, WORDS, backend=behind("b"))
    assert contents(out) == before
    again = behind("a")
    run(Path("referee"), out, WORDS, backend=again)
    assert again.asked == []
