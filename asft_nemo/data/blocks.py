"""The kept examples of a run's files: in memory where the files are raw, mapped where they were prepared.

Both forms give the same examples with the same numbers, and the report says the same of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from asft_nemo.config.schema import DataConfig
from asft_nemo.data.loading import Example, LoadReport, load, templates_of, too_long_error
from asft_nemo.data.manifest import open_parts
from asft_nemo.data.sources import BadRow
from asft_nemo.data.store import BAD_ROWS, Part, is_prepared
from asft_nemo.data.tokenization import TextTokenizer


class Examples(Protocol):
    """Examples within the sequence length, by their place."""

    def __getitem__(self, place: int) -> Example: ...


@dataclass(frozen=True)
class Block:
    """The kept examples of a file or of an entry.

    Attributes:
        examples: tokens and learned mask of each.
        lengths: tokens of each, int64 [items].
        labels: learned tokens of each, the first one excepted, which is never a label; int64 [items].
        sample_ids: row of each among the non-blank lines of all files, int64 [items].
        domain: which entry of the files.
    """

    examples: Examples
    lengths: np.ndarray
    labels: np.ndarray
    sample_ids: np.ndarray
    domain: int


class HeldExamples:
    """Examples in memory, as flat arrays: 5 bytes a token, and forked workers share them."""

    def __init__(self, examples: Sequence[Example]):
        self._starts = np.concatenate(
            [[0], np.cumsum([len(tokens) for tokens, _ in examples], dtype=np.int64)]
        )
        self._tokens = np.concatenate([np.empty(0, np.int32), *(tokens for tokens, _ in examples)])
        self._learned = np.concatenate([np.empty(0, np.bool_), *(learned for _, learned in examples)])

    def __getitem__(self, place: int) -> Example:
        start, stop = self._starts[place : place + 2]
        return self._tokens[start:stop], self._learned[start:stop]


class MappedExamples:
    """Examples of a prepared part.

    Args:
        part: that holds them.
        places: of the kept ones in the part, int64 [items].
        most: tokens of an example that are taken.
        everything: all tokens are learned.
    """

    def __init__(self, part: Part, places: np.ndarray, *, most: int, everything: bool):
        self._part, self._places, self._most, self._everything = part, places, most, everything

    def __getitem__(self, place: int) -> Example:
        tokens, learned = self._part.example(int(self._places[place]), self._most)
        return tokens, np.ones_like(learned) if self._everything else learned


def load_blocks(
    files: Iterable[str | Path], data: DataConfig, tokenizer: TextTokenizer, report: LoadReport
) -> list[Block]:
    """The kept examples of all entries, in order; `report` is filled in.

    Raises:
        DataError: a file cannot be read, a prepared directory does not fit the settings, or a row is too long and
            `data.on_too_long=fail`.
    """
    files = list(files)
    blocks: list[Block] = []
    for domain, (entry, template) in enumerate(zip(files, templates_of(data, len(files)), strict=True)):
        own = dataclasses.replace(data, template=template, templates=())
        if is_prepared(entry):
            parts = open_parts(Path(entry), own, tokenizer_dir=tokenizer.folder)
            blocks += [_mapped(part, name, own, domain, report) for name, part in parts]
        else:
            blocks.append(_held(entry, own, tokenizer, domain, report))
    return blocks


def _held(
    entry: str | Path, data: DataConfig, tokenizer: TextTokenizer, domain: int, report: LoadReport
) -> Block:
    examples, sample_ids, _ = load([entry], data, tokenizer, report)
    return Block(
        HeldExamples(examples),
        lengths=np.asarray([len(tokens) for tokens, _ in examples], dtype=np.int64),
        labels=np.asarray([int(learned[1:].sum()) for _, learned in examples], dtype=np.int64),
        sample_ids=np.asarray(sample_ids, dtype=np.int64),
        domain=domain,
    )


def _mapped(part: Part, file: str, data: DataConfig, domain: int, report: LoadReport) -> Block:
    """What `load` does with the rows of a file, done with all examples of its part at once."""
    most = data.sequence_length + 1  # the last token is only ever a label
    whole, everything = part.lengths(), data.loss_on == "all"
    too_long = whole > most
    if data.on_too_long == "fail" and too_long.any():
        first = int(too_long.argmax())
        raise too_long_error(file, int(part.index[first, 3]), int(whole[first]), data)
    nothing_left = too_long & (part.learned_within(most, first=0) == 0)
    kept = ~too_long if data.on_too_long == "drop" else ~nothing_left
    places = np.flatnonzero(kept)
    lengths = np.minimum(whole[places], most)
    labels = lengths - 1 if everything else part.learned_within(most, first=1)[places]
    report.bad += [BadRow(file, line, reason) for _, line, reason in part.left_out(BAD_ROWS)]
    report.contaminated += part.counts.contaminated
    report.lengths += whole.tolist()
    report.too_long += int(too_long.sum())
    report.no_response_left += 0 if data.on_too_long == "drop" else int(nothing_left.sum())
    report.kept += len(places)
    report.tokens += int((lengths - 1).sum())
    report.learned_tokens += int(labels.sum())
    first_row = report.rows
    report.rows += part.counts.rows
    return Block(
        MappedExamples(part, places, most=most, everything=everything),
        lengths=lengths,
        labels=labels,
        sample_ids=part.index[places, 2] + first_row,
        domain=domain,
    )
