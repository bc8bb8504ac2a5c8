"""What would become of the rows of some files, for `asft data check`.

No tokens are kept: memory grows by 40 bytes a row (digests and places, for finding duplicates), some 100 while they are sorted at the end, and
with the list of bad rows.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from asft_nemo.config.schema import DataConfig
from asft_nemo.data.duplicates import Digests, Places
from asft_nemo.data.loading import TokenizedRow, tokenized_rows
from asft_nemo.data.sources import BadRow, domain_names
from asft_nemo.data.tokenization import TextTokenizer

_BINS = 12  # of the histogram, about
_PLACES = 5  # of duplicates that are named
# What differs between reasons of one kind: where in the row it is.
_VARYING = re.compile(r"(?<=\bbyte )0x\w+|(?<=\bcolumn )\d+|(?<=\bmessage )\d+|(?<=conversation of )\d+")


@dataclass
class EntryCounts:
    """Rows and tokens of one entry of the files, or of all of them.

    Attributes:
        name: the domain's.
        rows: non-blank lines read.
        bad: unusable ones.
        lengths: tokens of a usable row, begin and end tokens included -> rows of that length.
        too_long: usable ones longer than the sequence length.
        no_response_left: truncated ones whose response lies wholly beyond the cut.
        kept: examples that remain.
        tokens: their input tokens.
        learned_tokens: their labels that count in the loss.
    """

    name: str
    rows: int = 0
    bad: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    too_long: int = 0
    no_response_left: int = 0
    kept: int = 0
    tokens: int = 0
    learned_tokens: int = 0

    def add(self, length: int, learned: Sequence[bool], data: DataConfig) -> None:
        """Counts one usable row of `length` tokens; `learned` says of each whether it is part of a response."""
        most = data.sequence_length + 1  # the last token is only ever a label
        self.lengths[length] += 1
        if length > most:
            self.too_long += 1
            if data.on_too_long != "truncate":
                return
            if not any(learned[:most]):
                self.no_response_left += 1
                return
        self.kept += 1
        inputs = min(length, most) - 1
        self.tokens += inputs
        self.learned_tokens += inputs if data.loss_on == "all" else sum(learned[1:most])

    def merge(self, other: EntryCounts) -> None:
        """Adds another entry's counts."""
        self.lengths.update(other.lengths)
        for name in ("rows", "bad", "too_long", "no_response_left", "kept", "tokens", "learned_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def summary(self) -> dict[str, Any]:
        """The counts as plain values; `lengths` in tokens, empty where no row is usable."""
        ranks = {"shortest": 0.0, "median": 0.5, "95th percentile": 0.95, "longest": 1.0}
        return {
            "rows": self.rows,
            "usable": self.rows - self.bad,
            "bad": self.bad,
            "lengths": {name: quantile(self.lengths, rank) for name, rank in ranks.items() if self.lengths},
            "too_long": self.too_long,
            "no_response_left": self.no_response_left,
            "kept": self.kept,
            "tokens": self.tokens,
            "learned_tokens": self.learned_tokens,
            "learned_share": round(self.learned_tokens / self.tokens, 4) if self.tokens else None,
        }


class Shown(NamedTuple):
    """An example to look at."""

    file: str
    line: int
    tokens: list[int]
    learned: list[bool]


class Reason(NamedTuple):
    """Bad rows of one kind."""

    reason: str  # places in it as ...
    rows: int
    first: BadRow


class Duplicates(NamedTuple):
    """Rows whose conversation an earlier one has; places are pairs of file:line, the later one first."""

    exact: int
    exact_places: list[tuple[str, str]]
    same_prompt: int  # the same prompt with another response
    same_prompt_places: list[tuple[str, str]]


class Bin(NamedTuple):
    """Rows of `first` to `last` tokens."""

    first: int
    last: int
    rows: int


@dataclass
class Inspection:
    """What `inspect_files` found.

    Attributes:
        entries: the counts of each entry of the files.
        bad: every unusable row.
        shown: the first examples of each entry.
        duplicates: among the usable rows of all entries; None before all are read.
    """

    entries: list[EntryCounts]
    bad: list[BadRow] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    duplicates: Duplicates | None = None

    def total(self) -> EntryCounts:
        """The counts of all entries together."""
        total = EntryCounts("all")
        for entry in self.entries:
            total.merge(entry)
        return total

    def reasons(self) -> list[Reason]:
        """Kinds of bad rows, the most frequent first; reasons that differ in the place alone are one kind."""
        kinds: dict[str, list[Any]] = {}
        for row in self.bad:
            found = kinds.setdefault(_VARYING.sub("...", row.reason), [0, row])
            found[0] += 1
        found = [Reason(reason, rows, first) for reason, (rows, first) in kinds.items()]
        return sorted(found, key=lambda kind: -kind.rows)


def inspect_files(
    files: Iterable[str | Path], data: DataConfig, *, tokenizer: TextTokenizer, show: int = 0
) -> Inspection:
    """Reads and tokenises all rows; bad and over-long ones are counted whatever the policies say.

    Args:
        files: entries as in `data.train`.
        data: fields, templates, sequence length; its file lists are not looked at.
        tokenizer: of the model.
        show: examples of each entry to keep.

    Raises:
        DataError: a file cannot be read at all.
    """
    files = list(files)
    found = Inspection([EntryCounts(name) for name in domain_names(files)])
    twins = _Twins()
    for counts, row in _rows(files, data, tokenizer, found.entries):
        counts.rows += 1
        if isinstance(row, BadRow):
            counts.bad += 1
            found.bad.append(row)
            continue
        tokens, learned = row.tokenized.tokens, row.tokenized.learned
        counts.add(len(tokens), learned, data)
        if counts.rows - counts.bad <= show:
            learned = [False] + [True] * (len(tokens) - 1) if data.loss_on == "all" else learned
            found.shown.append(Shown(row.record.file, row.record.line, tokens, learned))
        twins.add(row)
    found.duplicates = twins.found()
    return found


def histogram(lengths: Counter[int], bound: int) -> list[Bin]:
    """Lengths in bins of a round width; the last one reaches to the longest, and none lies across `bound`, the longest that fits."""
    if not lengths:
        return []
    longest = max(lengths)
    width = _round(max(1, quantile(lengths, 0.99)) / _BINS)
    firsts = [*range(0, min(longest, width * (_BINS + 1)) + 1, width)]
    if longest > bound:  # an edge of its own instead of one that is near it
        firsts = sorted(
            [bound + 1, *(first for first in firsts if not first or 2 * abs(first - bound - 1) > width)]
        )
    lasts = [*(first - 1 for first in firsts[1:]), longest]
    rows = [0] * len(firsts)
    places = np.searchsorted(firsts, list(lengths), side="right") - 1
    for place, count in zip(places.tolist(), lengths.values(), strict=True):
        rows[place] += count
    bins = [Bin(*values) for values in zip(firsts, lasts, rows, strict=True)]
    while bins[0].rows == 0:
        bins.pop(0)
    return bins


def quantile(lengths: Counter[int], share: float) -> int:
    """The smallest length that at least this share of the rows do not exceed."""
    values = sorted(lengths)
    least = share * sum(lengths.values())
    sums = accumulate(lengths[value] for value in values)
    return next((value for value, rows in zip(values, sums, strict=True) if rows >= least), values[-1])


class _Twins:
    """Collects what is needed to find duplicates."""

    def __init__(self) -> None:
        self._examples, self._prompts, self._places = Digests(), Digests(), Places()

    def add(self, row: TokenizedRow) -> None:
        *before, last = row.record.conversation.messages
        prompt = json.dumps([before, row.record.conversation.tools], sort_keys=True, default=str)
        self._prompts.add(prompt)
        self._examples.add(prompt + json.dumps(last, sort_keys=True, default=str))
        self._places.add(row.record.file, row.record.line)

    def found(self) -> Duplicates:
        examples, prompts = self._examples.first_rows(), self._prompts.first_rows()
        own = np.arange(len(examples))
        exact = np.flatnonzero(examples != own)
        same_prompt = np.flatnonzero((examples == own) & (prompts != own))
        return Duplicates(
            len(exact),
            [(self._places[row], self._places[int(examples[row])]) for row in exact[:_PLACES].tolist()],
            len(same_prompt),
            [(self._places[row], self._places[int(prompts[row])]) for row in same_prompt[:_PLACES].tolist()],
        )


def _rows(
    files: Sequence[str | Path], data: DataConfig, tokenizer: TextTokenizer, entries: Sequence[EntryCounts]
) -> Iterator[tuple[EntryCounts, TokenizedRow | BadRow]]:
    """All rows, each with the counts of its entry."""
    for place, (entry, counts) in enumerate(zip(files, entries, strict=True)):
        template = data.templates[place] if data.templates else data.template
        own = dataclasses.replace(data, template=template, templates=())
        for row in tokenized_rows([entry], own, tokenizer):
            yield counts, row


def _round(width: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is no less."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step >= width:
                return factor * step
        step *= 10
