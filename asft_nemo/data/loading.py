"""Files to tokenised examples, with a report of everything that was left out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from asft_nemo.config.schema import DataConfig
from asft_nemo.data.records import Conversation
from asft_nemo.data.sources import BadRow, Record, read_records
from asft_nemo.data.templates import Rendered, render
from asft_nemo.data.tokenization import TextTokenizer, Tokenized
from asft_nemo.errors import DataError

log = logging.getLogger(__name__)

_CHUNK, _CHUNK_CHARACTERS = 1024, 2 << 20  # records tokenised at once, and about how much text

# An example within the sequence length: tokens, int32, and whether each is learned, bool.
Example = tuple[np.ndarray, np.ndarray]

# A conversation as text, or why it cannot be one.
Renderer = Callable[[Conversation], Rendered | str]


@dataclass
class LoadReport:
    """What became of the rows.

    Attributes:
        rows: non-blank lines read.
        bad: the unusable ones.
        contaminated: rows that `asft data prepare` left out for the evaluation questions in them.
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
    contaminated: int = 0
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


class TokenizedRow(NamedTuple):
    """A usable row: what it says, as text, as tokens."""

    record: Record
    rendered: Rendered
    tokenized: Tokenized


def tokenized_rows(
    files: Iterable[str | Path], data: DataConfig, tokenizer: TextTokenizer
) -> Iterator[TokenizedRow | BadRow]:
    """All rows of all files in order, each tokenised whole or as the reason why it is not; a chunk of them is in memory at a time.

    Raises:
        DataError: a file cannot be read at all, or `data.templates` has another number of entries than `files`.
    """
    files = list(files)
    records = read_records(files, data.fields)
    renderers = _renderers(data, tokenizer, entries=len(files))
    for chunk in in_chunks(records, characters=_CHUNK_CHARACTERS):
        yield from tokenize_records(chunk, renderers, tokenizer)


def tokenize_records(
    records: Sequence[Record | BadRow], renderers: Sequence[Renderer], tokenizer: TextTokenizer
) -> Iterator[TokenizedRow | BadRow]:
    """Rows tokenised together, in order; `renderers` has one for each domain."""
    texts = [record if isinstance(record, BadRow) else _render(record, renderers) for record in records]
    tokenized = iter(tokenizer.encode([text for text in texts if isinstance(text, Rendered)]))
    for record, text in zip(records, texts, strict=True):
        if isinstance(record, BadRow):
            yield record
            continue
        if isinstance(text, BadRow):
            yield text
            continue
        example = next(tokenized)
        if any(example.learned[1:]):  # the first token is never a label
            yield TokenizedRow(record, text, example)
        else:
            yield BadRow(record.file, record.line, "no token of it would be learned")


def in_chunks(records: Iterable[Record | BadRow], *, characters: int) -> Iterator[list[Record | BadRow]]:
    """Records in lists short enough for their tokens to be in memory, however long the records are: a list ends with the record that
    brings it to so many characters.
    """
    chunk: list[Record | BadRow] = []
    held = 0
    for record in records:
        chunk.append(record)
        if isinstance(record, Record):
            held += sum(len(message["content"]) for message in record.conversation.messages)
        if len(chunk) == _CHUNK or held >= characters:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def load(
    files: Iterable[str | Path], data: DataConfig, tokenizer: TextTokenizer, report: LoadReport
) -> tuple[list[Example], list[int], list[int]]:
    """The examples within the sequence length, their ids and their domains; `report` is filled in.

    Raises:
        DataError: a file cannot be read at all, or a row is too long and `data.on_too_long=fail`.
    """
    examples: list[Example] = []
    sample_ids: list[int] = []
    domain_ids: list[int] = []
    for number, row in enumerate(tokenized_rows(files, data, tokenizer), start=report.rows):
        report.rows += 1
        if isinstance(row, BadRow):
            report.bad.append(row)
            continue
        report.lengths.append(len(row.tokenized.tokens))
        fitted = _fit(row.tokenized, row.record, data, report)
        if fitted is not None:
            examples.append(fitted)
            sample_ids.append(number)
            domain_ids.append(row.record.domain)
            report.kept += 1
            report.tokens += len(fitted[0]) - 1
            report.learned_tokens += int(fitted[1][1:].sum())
    return examples, sample_ids, domain_ids


def templates_of(data: DataConfig, entries: int) -> tuple[str, ...]:
    """Every entry's template; `data.template` where `data.templates` names none.

    Raises:
        DataError: `data.templates` has another number of entries.
    """
    names = data.templates or (data.template,) * entries
    if len(names) != entries:
        raise DataError(
            f"data.templates names {len(names)} templates for {entries} entries of files: name one for each, or none"
        )
    return names


def _renderers(data: DataConfig, tokenizer: TextTokenizer, *, entries: int) -> list[Renderer]:
    """Every entry's renderer."""
    names = templates_of(data, entries)
    made = {name: renderer_of(name, data.loss_on, tokenizer) for name in set(names)}
    return [made[name] for name in names]


def renderer_of(template: str, loss_on: str, tokenizer: TextTokenizer) -> Renderer:
    """How a conversation becomes text, or why it does not."""
    if template == "chat":
        chat = tokenizer.chat_template()
        return lambda conversation: chat.render(conversation, loss_on)

    def of_pair(conversation: Conversation) -> Rendered | str:
        pair = conversation.pair()
        if pair is not None:
            return render(template, *pair)
        return (
            f"a conversation of {len(conversation.messages)} messages does not fit data.template={template}, which has "
            "one prompt and one response: set data.template=chat"
        )

    return of_pair


def _render(record: Record, renderers: Sequence[Renderer]) -> Rendered | BadRow:
    rendered = renderers[record.domain](record.conversation)
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
            raise too_long_error(record.file, record.line, len(example.tokens), data)
        report.too_long += 1
        if data.on_too_long == "drop":
            return None
        if not learned.any():
            report.no_response_left += 1
            return None
    return tokens, np.ones_like(learned) if data.loss_on == "all" else learned


def too_long_error(file: str, line: int, tokens: int, data: DataConfig) -> DataError:
    """The error about a row that is too long where `data.on_too_long=fail`."""
    return DataError(
        f"{file}:{line}: {tokens} tokens do not fit data.sequence_length={data.sequence_length}: raise it, or set data.on_too_long=drop "
        "or truncate"
    )


def nothing_left(report: LoadReport, data: DataConfig) -> str:
    """Why there is no example."""
    if not report.lengths:
        return f"all {report.rows} rows are bad: the first is {report.bad[0]}"
    cure = "" if data.on_too_long == "truncate" else ", or set data.on_too_long=truncate"
    return (
        f"every example is longer than data.sequence_length={data.sequence_length} (the shortest has "
        f"{min(report.lengths)} tokens): raise data.sequence_length{cure}"
    )


def say(report: LoadReport, data: DataConfig) -> None:
    """Logs what became of the rows."""
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
