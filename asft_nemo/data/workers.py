"""Rows to tokens in several processes: what they get, what they give back, in order.

The parent reads and does not decode: it cuts a file into pieces and hands some at a time to a process, which parses, renders and tokenises
them. Only bytes and arrays travel. Every process uses one thread: on as many cores, processes are faster than the tokenizer's own
threads, for parsing, rendering and the masks run in Python.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from asft_nemo.config.schema import DataConfig, FieldsConfig
from asft_nemo.data.contamination import EvaluationIndex, found_in
from asft_nemo.data.files import Piece, Pieces, bytes_of, decoded, pieces
from asft_nemo.data.loading import in_chunks, renderer_of, tokenize_records
from asft_nemo.data.records import form_of
from asft_nemo.data.sources import BadRow, empty_error, records_of
from asft_nemo.data.store import LeftOut, TokenizedChunk, chunk_of
from asft_nemo.data.tokenization import TextTokenizer
from asft_nemo.errors import DataError

_CHUNK_BYTES = 1 << 20  # of rows handed over at once; one row can be 10 times as long
_CHUNK_ROWS = 1024
_ENCODED_CHARACTERS = 1 << 18  # at once: what the tokenizer tells of a text takes 100 times its memory
_PARALLELISM = "TOKENIZERS_PARALLELISM"  # which the tokenizers library reads at every call
Mark = TypeVar("Mark")


class Task(NamedTuple):
    """Some consecutive rows of a file.

    Attributes:
        file: its name, for reasons.
        pieces: the rows as they are read.
        fields: names of the row's fields that showed the file's form, None where no row before these has a known form.
        rows, nbytes: how much it is.
    """

    file: str
    pieces: list[Piece]
    fields: tuple[str, ...] | None
    rows: int
    nbytes: int


class Setup:
    """What turns a task into tokens.

    Args:
        data: fields, template, what is learned.
        tokenizer: of the model.
        suites: rows that hold one of their questions are left out; None = none are.
    """

    def __init__(self, data: DataConfig, tokenizer: TextTokenizer, suites: EvaluationIndex | None):
        self._fields, self._tokenizer, self._suites = data.fields, tokenizer, suites
        self._renderer = renderer_of(data.template, data.loss_on, tokenizer)

    def __call__(self, task: Task) -> TokenizedChunk:
        """The rows of a task, tokenised."""
        form = None if task.fields is None else form_of(dict.fromkeys(task.fields), self._fields)
        rows = (row for piece in task.pieces for row in decoded(piece))
        records = records_of(rows, self._fields, file=task.file, domain=0, form=form)
        examples: list[tuple[np.ndarray, np.ndarray]] = []
        places: list[tuple[int, int]] = []
        bad: list[LeftOut] = []
        contaminated: list[LeftOut] = []
        tokenized = (
            row
            for some in in_chunks(records, characters=_ENCODED_CHARACTERS)
            for row in tokenize_records(some, [self._renderer], self._tokenizer)
        )
        for number, row in enumerate(tokenized):
            if isinstance(row, BadRow):
                bad.append((number, row.line, row.reason))
                continue
            found = None if self._suites is None else found_in(row.record, self._suites)
            if found is not None:
                contaminated.append((number, row.record.line, found.what))
                continue
            examples.append(
                (np.asarray(row.tokenized.tokens, np.int32), np.asarray(row.tokenized.learned, np.bool_))
            )
            places.append((number, row.record.line))
        return chunk_of(task.rows, examples, places, bad, contaminated)


def tasks(path: Path, fields: FieldsConfig, *, skip_rows: int) -> Iterator[Task]:
    """A file in tasks, from some row on.

    Args:
        path: of the file.
        fields: where to find the texts.
        skip_rows: rows that need not be done again.

    Raises:
        DataError: the file cannot be read, or has no row.
    """
    form, rows = None, 0
    for group, count, nbytes in _groups(pieces(path), skip_rows):
        if rows < skip_rows < rows + count:
            raise RuntimeError(f"{path}: {skip_rows} rows were done, which is inside a batch")
        rows += count
        if rows > skip_rows:
            yield Task(str(path), group, form, count, nbytes)
        if form is None:
            form = _form(group, fields)
    if not rows:
        raise empty_error(path)


def _groups(stream: Pieces, cut: int) -> Iterator[tuple[list[Piece], int, int]]:
    """Pieces in groups with their rows and bytes; a group ends after `cut` rows, so that none lies across it."""
    group: list[Piece] = []
    rows = nbytes = total = 0
    for piece in stream:
        content = piece[1]
        count, size = (
            (1, len(content)) if isinstance(content, bytes) else (content.num_rows, bytes_of(content))
        )
        group.append(piece)
        rows, nbytes, total = rows + count, nbytes + size, total + count
        if rows >= _CHUNK_ROWS or nbytes >= _CHUNK_BYTES or total == cut:
            yield group, rows, nbytes
            group, rows, nbytes = [], 0, 0
    if group:
        yield group, rows, nbytes


def _form(group: list[Piece], fields: FieldsConfig) -> tuple[str, ...] | None:
    """The fields of the first row that has a known form."""
    rows = (row for piece in group for _, row in decoded(piece))
    known = (row for row in rows if isinstance(row, dict) and form_of(row, fields) is not None)
    return next((tuple(row) for row in known), None)


class Run(Protocol):
    """Does tasks of several files; the results come in the order of the tasks."""

    def __call__(
        self, jobs: Iterator[tuple[Mark, Task | None]]
    ) -> Iterator[tuple[Mark, Task | None, TokenizedChunk | None]]:
        """Each job's mark and task with its result; a job without a task keeps its place."""
        ...


@contextmanager
def processes(count: int, setup: Setup, *, close: int) -> Iterator[Run]:
    """Processes that do tasks; with a count of 1 this process does them itself.

    Args:
        count: of processes.
        setup: what they do; not copied, for they are forked.
        close: a file descriptor that they must not keep open, the lock's.
    """
    if count == 1:
        with _one_thread():
            yield lambda jobs: _alone(jobs, setup)
        return
    left_open, held = os.pipe()
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context("fork"), initializer=_begin, initargs=(setup, (close, held))
    )
    # All processes start with the first job: here, before the parent reads with libraries that have threads.
    try:
        pool.submit(os.getpid)
    except OSError as error:
        os.close(left_open)
        raise DataError(
            f"{count} tokenising processes cannot be started ({error.strerror or error}): give fewer --workers"
        ) from error
    finally:
        os.close(held)
    try:
        with open(left_open, "rb") as stream:
            stream.read()  # ends when all have closed both: a parent that is killed later leaves nobody who keeps the lock
        yield lambda jobs: _shared(jobs, pool, window=2 * count + 2)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before


def _alone(
    jobs: Iterator[tuple[Mark, Task | None]], work: Callable[[Task], TokenizedChunk]
) -> Iterator[tuple[Mark, Task | None, TokenizedChunk | None]]:
    for mark, task in jobs:
        yield mark, task, None if task is None else work(task)


def _shared(
    jobs: Iterator[tuple[Mark, Task | None]], pool: ProcessPoolExecutor, *, window: int
) -> Iterator[tuple[Mark, Task | None, TokenizedChunk | None]]:
    """No more than `window` jobs are in memory at a time."""
    waiting: deque[tuple[Mark, Task | None, Future[TokenizedChunk] | None]] = deque()
    try:
        for mark, task in jobs:
            waiting.append((mark, task, None if task is None else pool.submit(_work, task)))
            if len(waiting) >= window:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenising process ended by itself, perhaps for want of memory: run the command again with fewer --workers; it goes on "
            "where it was"
        ) from error


def _result(
    mark: Mark, task: Task | None, future: Future[TokenizedChunk] | None
) -> tuple[Mark, Task | None, TokenizedChunk | None]:
    return mark, task, None if future is None else future.result()


_setup: Setup | None = None  # a tokenising process's own


def _begin(setup: Setup, close: tuple[int, ...]) -> None:
    global _setup
    _setup = setup
    for descriptor in close:
        os.close(descriptor)
    os.environ[_PARALLELISM] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the processes
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A pool's processes wait for work for ever when their parent has been killed.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(task: Task) -> TokenizedChunk:
    assert _setup is not None
    return _setup(task)
