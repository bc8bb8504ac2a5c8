"""What `asft data check` says on a terminal."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TextIO

from asft_nemo.config.schema import DataConfig
from asft_nemo.data.inspection import Duplicates, EntryCounts, Inspection, Shown, histogram
from asft_nemo.data.tokenization import TextTokenizer

COLOURS = ("auto", "always", "never")
_MOST_SHOWN = 600  # tokens of an example; from longer ones the middle is left out
_LEARNED, _CONTROL, _FAINT, _PLAIN = "\033[32m", "\033[7m", "\033[2m", "\033[0m"
_BOUNDARY = "·"  # between two tokens
_OPEN, _CLOSE = "[[", "]]"  # around learned text where there is no colour


def coloured(choice: str, stream: TextIO) -> bool:
    """Whether to colour: as asked for; `auto` colours a terminal unless NO_COLOR is set (https://no-color.org)."""
    if choice != "auto":
        return choice == "always"
    return stream.isatty() and not os.environ.get("NO_COLOR")


def check_words(found: Inspection, data: DataConfig, tokenizer: str) -> str:
    """Counts, reasons, lengths and duplicates."""
    total = found.total()
    lines = [f"{total.rows} rows, {total.rows - total.bad} usable, {total.bad} bad"]
    lines += [
        f"  {kind.rows} x {kind.reason} (first: {kind.first.file}:{kind.first.line})"
        for kind in found.reasons()
    ]
    if total.lengths:
        lines += _tokens(total, data, tokenizer)
    if found.duplicates is not None:
        lines += _duplicates(found.duplicates)
    if len(found.entries) > 1:
        lines += _entries(found.entries)
    return "\n".join(lines)


def _tokens(total: EntryCounts, data: DataConfig, tokenizer: str) -> Iterator[str]:
    figures = ", ".join(f"{name} {value}" for name, value in total.summary()["lengths"].items())
    yield f"tokens an example: {figures} (tokenizer of {tokenizer})"
    yield from _bars(total, data.sequence_length)
    yield (
        f"{total.too_long} examples are longer than data.sequence_length={data.sequence_length}; "
        f"{total.kept} remain with {total.tokens} tokens, {total.learned_tokens} of them learned{_shares(total)}"
    )


def _shares(counts: EntryCounts) -> str:
    if not counts.tokens:
        return ""
    share = 100 * counts.learned_tokens / counts.tokens
    return f" ({share:.1f} % learned, {100 - share:.1f} % masked)"


def _bars(total: EntryCounts, sequence_length: int) -> Iterator[str]:
    """The histogram, a line a bin, with a line where the sequence length ends."""
    bins = histogram(total.lengths, sequence_length + 1)
    names = [f"{found.first}-{found.last}" for found in bins]
    wide, most = max(map(len, names)), max(found.rows for found in bins)
    room = max(10, min(60, shutil.get_terminal_size().columns - wide - len(str(most)) - 6))
    for name, found in zip(names, bins, strict=True):
        if found.first == sequence_length + 2:
            yield f"  {'-' * wide} data.sequence_length={sequence_length} {'-' * 10}"
        bar = "#" * max(found.rows > 0, round(room * found.rows / most))
        yield f"  {name:>{wide}} {bar}{' ' if bar else ''}{found.rows}"


def _duplicates(found: Duplicates) -> Iterator[str]:
    for rows, what, places in (
        (found.exact, "exact copies of an earlier row", found.exact_places),
        (
            found.same_prompt,
            "with an earlier row's prompt and another response",
            found.same_prompt_places,
        ),
    ):
        if rows:
            pairs = ", ".join(f"{later} = {earlier}" for later, earlier in places)
            yield f"duplicates: {rows} {what}: {pairs}{', ...' if rows > len(places) else ''}"
    if not found.exact and not found.same_prompt:
        yield "no duplicates"


def _entries(entries: Sequence[EntryCounts]) -> Iterator[str]:
    wide = max(len("entry"), *(len(entry.name) for entry in entries))
    yield f"{'entry':<{wide}}  {'rows':>9} {'bad':>7} {'too long':>8} {'kept':>9} {'tokens':>12} {'learned':>8} {'median':>7}"
    for entry in entries:
        values = entry.summary()
        share = "-" if values["learned_share"] is None else f"{100 * values['learned_share']:.1f} %"
        median = values["lengths"].get("median", "-")
        yield (
            f"{entry.name:<{wide}}  {entry.rows:>9} {entry.bad:>7} {entry.too_long:>8} {entry.kept:>9} {entry.tokens:>12} "
            f"{share:>8} {median:>7}"
        )


def example_words(shown: Shown, data: DataConfig, tokenizer: TextTokenizer, *, colour: bool) -> str:
    """One example, token by token, with what is learned marked."""
    length, most = len(shown.tokens), data.sequence_length + 1
    fate = ""
    if length > most:
        fate = f", longer than data.sequence_length={data.sequence_length}"
    head = f"{shown.file}:{shown.line}: {length} tokens, {sum(shown.learned[1:])} learned{fate}"
    parts: list[str] = []
    for start, stop in _spans(length):
        if start:
            parts.append(f"\n... {start - _MOST_SHOWN // 2} tokens ...\n")
        tokens, learned = shown.tokens[start:stop], shown.learned[start:stop]
        parts.append(_marked(_pieces(tokens, tokenizer), tokens, learned, tokenizer, colour=colour))
    return f"{head}\n{''.join(parts)}"


def legend(*, colour: bool) -> str:
    """How to read the examples."""
    learned = f"{_LEARNED}green{_PLAIN}" if colour else f"between {_OPEN} and {_CLOSE}"
    return f"examples: what is learned is {learned}; {_BOUNDARY} divides tokens, control tokens are whole"


def _spans(length: int) -> list[tuple[int, int]]:
    if length <= _MOST_SHOWN:
        return [(0, length)]
    return [(0, _MOST_SHOWN // 2), (length - _MOST_SHOWN // 2, length)]


def _pieces(tokens: Sequence[int], tokenizer: TextTokenizer) -> list[str]:
    """The text of each token; a character of several tokens stands whole at the last of them."""
    pieces: list[str] = []
    done = ""
    for stop in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:stop])
        whole = stop == len(tokens) or (text.startswith(done) and not text.endswith("\ufffd"))
        pieces.append(text[len(done) :] if whole else "")
        done = text if whole else done
    return pieces


def _marked(
    pieces: Sequence[str],
    tokens: Sequence[int],
    learned: Sequence[bool],
    tokenizer: TextTokenizer,
    *,
    colour: bool,
) -> str:
    marks: list[str] = []
    told = zip(pieces, tokens, learned, strict=True)
    for is_learned, run in groupby(told, key=lambda token: token[2]):
        words = [(_visible(piece), token in tokenizer.control) for piece, token, _ in run if piece]
        if not words:
            continue
        if not colour:
            text = _BOUNDARY.join(word for word, _ in words)
            marks.append(f"{_OPEN}{text}{_CLOSE}" if is_learned else text)
            continue
        own = _LEARNED if is_learned else ""
        shown = [f"{own}{_CONTROL if control else ''}{word}{_PLAIN}" for word, control in words]
        marks.append(f"{_FAINT}{_BOUNDARY}{_PLAIN}".join(shown))
    between = f"{_FAINT}{_BOUNDARY}{_PLAIN}" if colour else _BOUNDARY
    return between.join(marks)


def _visible(text: str) -> str:
    """The text with its control characters written out, so that no row can steer the terminal."""
    return "".join(
        char
        if char == "\n" or unicodedata.category(char)[0] != "C"
        else char.encode("unicode_escape").decode()
        for char in text
    )


def printable(text: str, stream: TextIO) -> str:
    """The text as the stream's encoding can say it."""
    encoding = stream.encoding or sys.getdefaultencoding()
    return text.encode(encoding, errors="backslashreplace").decode(encoding)
