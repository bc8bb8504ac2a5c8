"""Files to a dataset of fixed-length items, with a report of everything that was left out."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from asft_nemo.config.schema import DataConfig
from asft_nemo.data.records import Conversation
from asft_nemo.data.sources import BadRow, Record, bad_rows_error, read_records
from asft_nemo.data.templates import Rendered, render
from asft_nemo.data.tokenization import TextTokenizer, Tokenized
from asft_nemo.errors import DataError

log = logging.getLogger(__name__)

FILLER = -1  # index (and sample id) of an item without any learned token
_CHUNK = 1024  # records tokenised at once

# An example within the sequence length: tokens, int32, and whether each is learned, bool.
Example = tuple[np.ndarray, np.ndarray]


@dataclass
class LoadReport:
    """What became of the rows.

    Attributes:
        rows: non-blank lines read.
        bad: the unusable ones.
        too_long: usable ones longer than the sequence length: dropped or truncated, as `data.on_too_long`
            says.
        no_response_left: truncated ones whose response lay wholly beyond the cut; dropped.
        lengths: tokens of every usable row before dropping or truncating, begin and end tokens included.
        kept: items of the dataset.
        tokens: input tokens of the kept items, padding excluded.
        learned_tokens: labels that count in the loss.
    """

    rows: int = 0
    bad: list[BadRow] = field(default_factory=list)
    too_long: int = 0
    no_response_left: int = 0
    lengths: list[int] = field(default_factory=list)
    kept: int = 0
    tokens: int = 0
    learned_tokens: int = 0

    def summary(self) -> dict[str, Any]:
        """The counts as plain values; `lengths` in tokens, empty where no row is usable."""
        lengths: dict[str, int] = {}
        if self.lengths:
            ranks = {"shortest": 0, "median": 50, "95th percentile": 95, "longest": 100}
            lengths = {
                name: int(np.percentile(self.lengths, rank, method="higher")) for name, rank in ranks.items()
            }
        return {
            "rows": self.rows,
            "usable": self.rows - len(self.bad),
            "bad": len(self.bad),
            "lengths": lengths,
            "too_long": self.too_long,
            "no_response_left": self.no_response_left,
            "kept": self.kept,
            "tokens": self.tokens,
            "learned_tokens": self.learned_tokens,
        }


class SupervisedDataset(Dataset[dict[str, Tensor]]):
    """Prompt-response examples as next-token items of `sequence_length` tokens, padded on the right.

    An item is a dict of `tokens`, `labels` (already shifted: the label of position i is token i + 1) and
    `position_ids`, int64 [S]; `loss_mask`, bool [S], True where the label counts; `sample_id`, int64
    scalar, the row's number among the non-blank lines of all files; and `domain_id`, int64 scalar, the place
    of its file among the files. Index -1 is a filler item: padding only, nothing learned, both ids -1.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        sample_ids: Sequence[int],
        domain_ids: Sequence[int],
        *,
        sequence_length: int,
        pad_id: int,
        report: LoadReport | None = None,
    ):
        self.sequence_length, self.pad_id = sequence_length, pad_id
        self.report = report or LoadReport(rows=len(examples), kept=len(examples))
        lengths = [len(tokens) for tokens, _ in examples]
        if max(lengths, default=0) > sequence_length + 1:
            raise ValueError(
                f"an example of {max(lengths)} tokens does not fit sequence_length={sequence_length}"
            )
        # One flat array instead of a list of lists: 4 bytes a token, and forked workers share it.
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._tokens = np.concatenate([np.empty(0, np.int32), *(tokens for tokens, _ in examples)])
        self._learned = np.concatenate([np.empty(0, np.bool_), *(learned for _, learned in examples)])
        # The first token is never a label.
        self._labels = np.asarray([int(learned[1:].sum()) for _, learned in examples], dtype=np.int64)
        self._sample_ids = np.asarray(sample_ids, dtype=np.int64)
        self._domain_ids = np.asarray(domain_ids, dtype=np.int64)

    @classmethod
    def from_files(
        cls,
        files: Iterable[str | Path],
        data: DataConfig,
        *,
        tokenizer: TextTokenizer,
        vocab_size: int | None = None,
    ) -> SupervisedDataset:
        """Reads, renders and tokenises files, and says what was left out.

        Args:
            files: JSON Lines files.
            data: fields, template, sequence length and policies; its file lists are not looked at.
            tokenizer: of the model.
            vocab_size: the model's rows; a tokenizer with more ids is refused.

        Raises:
            DataError: a file cannot be read, rows are bad and `data.on_bad_row=fail`, rows are too long and
                `data.on_too_long=fail`, or nothing is left.
        """
        if vocab_size is not None and tokenizer.size > vocab_size:
            raise DataError(
                f"the tokenizer has {tokenizer.size} tokens but the model only {vocab_size} rows: use the "
                "model's own tokenizer"
            )
        report = LoadReport()
        examples, sample_ids, domain_ids = _load(files, data, tokenizer, report)
        if report.bad and data.on_bad_row == "fail":
            raise bad_rows_error(report.bad)
        if not examples:
            raise DataError(_nothing_left(report, data))
        _say(report, data)
        return cls(
            examples,
            sample_ids,
            domain_ids,
            sequence_length=data.sequence_length,
            pad_id=tokenizer.pad_id,
            report=report,
        )

    def __len__(self) -> int:
        return len(self._sample_ids)

    @property
    def sample_ids(self) -> np.ndarray:
        """The id of every item, int64 [items]."""
        return self._sample_ids

    @property
    def domain_ids(self) -> np.ndarray:
        """The place of every item's file among the files, int64 [items]."""
        return self._domain_ids

    @property
    def lengths(self) -> np.ndarray:
        """Input tokens of every item, padding excluded, int64 [items]."""
        return np.diff(self._starts) - 1

    def learned_tokens(self, sample_ids: Iterable[int]) -> int:
        """Labels that count in the examples of these ids, as far as they are here."""
        chosen = np.isin(self._sample_ids, np.fromiter(sample_ids, dtype=np.int64))
        return int(self._labels[chosen].sum())

    def numbered_from(self, first: int) -> SupervisedDataset:
        """The same items with ids that begin at `first`, so that two sets of a run share none."""
        other = copy.copy(self)
        other._sample_ids = self._sample_ids + first
        return other

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        size = self.sequence_length
        tokens = torch.full((size,), self.pad_id, dtype=torch.int64)
        labels = torch.full((size,), self.pad_id, dtype=torch.int64)
        loss_mask = torch.zeros(size, dtype=torch.bool)
        sample_id = domain_id = FILLER
        if index != FILLER:
            if not 0 <= index < len(self):
                raise IndexError(f"item {index} of {len(self)}")
            start, stop = self._starts[index : index + 2]
            whole = torch.from_numpy(self._tokens[start:stop].astype(np.int64))
            count = len(whole) - 1
            tokens[:count], labels[:count] = whole[:-1], whole[1:]
            # Label i is token i + 1, so the first learned label stands one place before the response.
            loss_mask[:count] = torch.from_numpy(self._learned[start + 1 : stop])
            sample_id, domain_id = int(self._sample_ids[index]), int(self._domain_ids[index])
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": torch.arange(size),
            "sample_id": torch.tensor(sample_id),
            "domain_id": torch.tensor(domain_id),
        }


def inspect_files(files: Iterable[str | Path], data: DataConfig, *, tokenizer: TextTokenizer) -> LoadReport:
    """What would become of the rows; bad and over-long rows are counted whatever the policies say.

    Raises:
        DataError: a file cannot be read at all.
    """
    report = LoadReport()
    if data.on_too_long == "fail":
        data = dataclasses.replace(data, on_too_long="drop")
    _load(files, data, tokenizer, report)
    return report


def _load(
    files: Iterable[str | Path], data: DataConfig, tokenizer: TextTokenizer, report: LoadReport
) -> tuple[list[Example], list[int], list[int]]:
    examples: list[Example] = []
    sample_ids: list[int] = []
    domain_ids: list[int] = []
    records = read_records(files, data.fields)
    renderer = _renderer(data, tokenizer)
    while chunk := list(islice(records, _CHUNK)):
        usable: list[tuple[int, Record, Rendered]] = []
        bad: dict[int, BadRow] = {}
        for number, record in enumerate(chunk, start=report.rows):
            rendered = record if isinstance(record, BadRow) else _render(record, renderer)
            if isinstance(rendered, BadRow):
                bad[number] = rendered
            elif isinstance(record, Record):
                usable.append((number, record, rendered))
        report.rows += len(chunk)
        tokenized = tokenizer.encode([rendered for _, _, rendered in usable])
        for (number, record, _), example in zip(usable, tokenized, strict=True):
            if not any(example.learned[1:]):  # the first token is never a label
                bad[number] = BadRow(record.file, record.line, "no token of it would be learned")
                continue
            report.lengths.append(len(example.tokens))
            fitted = _fit(example, record, data, report)
            if fitted is not None:
                examples.append(fitted)
                sample_ids.append(number)
                domain_ids.append(record.domain)
                report.kept += 1
                report.tokens += len(fitted[0]) - 1
                report.learned_tokens += int(fitted[1][1:].sum())
        report.bad += [row for _, row in sorted(bad.items())]
    return examples, sample_ids, domain_ids


def _renderer(data: DataConfig, tokenizer: TextTokenizer) -> Callable[[Conversation], Rendered | str]:
    """How a conversation becomes text, or why it does not."""
    if data.template == "chat":
        chat = tokenizer.chat_template()
        return lambda conversation: chat.render(conversation, data.loss_on)

    def of_pair(conversation: Conversation) -> Rendered | str:
        pair = conversation.pair()
        if pair is not None:
            return render(data.template, *pair)
        return (
            f"a conversation of {len(conversation.messages)} messages does not fit data.template={data.template}, which has "
            "one prompt and one response: set data.template=chat"
        )

    return of_pair


def _render(record: Record, renderer: Callable[[Conversation], Rendered | str]) -> Rendered | BadRow:
    rendered = renderer(record.conversation)
    return BadRow(record.file, record.line, rendered) if isinstance(rendered, str) else rendered


def _fit(example: Tokenized, record: Record, data: DataConfig, report: LoadReport) -> Example | None:
    """The example within the sequence length, or None where it is left out."""
    most = data.sequence_length + 1  # the last token is only ever a label
    tokens, learned = (
        np.asarray(example.tokens, np.int32)[:most],
        np.asarray(example.learned, np.bool_)[:most],
    )
    if len(example.tokens) > most:
        if data.on_too_long == "fail":
            raise DataError(
                f"{record.file}:{record.line}: {len(example.tokens)} tokens do not fit data.sequence_length="
                f"{data.sequence_length}: raise it, or set data.on_too_long=drop or truncate"
            )
        report.too_long += 1
        if data.on_too_long == "drop":
            return None
        if not learned.any():
            report.no_response_left += 1
            return None
    return tokens, np.ones_like(learned) if data.loss_on == "all" else learned


def _nothing_left(report: LoadReport, data: DataConfig) -> str:
    if not report.lengths:
        return f"all {report.rows} rows are bad: the first is {report.bad[0]}"
    cure = "" if data.on_too_long == "truncate" else ", or set data.on_too_long=truncate"
    return (
        f"every example is longer than data.sequence_length={data.sequence_length} (the shortest has "
        f"{min(report.lengths)} tokens): raise data.sequence_length{cure}"
    )


def _say(report: LoadReport, data: DataConfig) -> None:
    log.info(
        "data: %d rows, %d kept, %d tokens, %d learned (%.1f %%)",
        report.rows,
        report.kept,
        report.tokens,
        report.learned_tokens,
        100 * report.learned_tokens / report.tokens,
    )
    if report.bad:
        log.warning("data: %d bad rows skipped, the first is %s", len(report.bad), report.bad[0])
    if report.too_long:
        action = "dropped" if data.on_too_long == "drop" else "truncated"
        log.warning(
            "data: %d of %d examples are longer than data.sequence_length=%d and were %s",
            report.too_long - report.no_response_left,
            len(report.lengths),
            data.sequence_length,
            action,
        )
    if report.no_response_left:
        log.warning(
            "data: %d truncated examples had no response left and were dropped", report.no_response_left
        )
