"""What a model is asked, one request a completion, and the journal that remembers every answer.

The journal is `samples.jsonl` itself: while an evaluation runs, answers are appended to it chunk by chunk. A request is
known by a hash of everything its answer depends on, so an evaluation that is started again asks only what is new,
whatever cut the file off and wherever. What is in it and not asked for goes into `other_answers.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from asft_eval.graders import JUDGED
from asft_eval.result import SAMPLES, constant, named, write_whole
from asft_eval.types import Completion, Example, Protocol, Suite

log = logging.getLogger(__name__)

CHOICES = Protocol(name="choices", max_tokens=1)
"""How suites of multiple choice are asked whatever the protocol: log probabilities are not drawn."""

OTHERS = "other_answers.jsonl"
"""Beside `samples.jsonl`: answers of the same model that no result counts now, e.g. of examples that `--limit` leaves out. They are not asked for again."""

_OF_A_VERDICT = ("parsed", "correct", "reason")


@dataclass(frozen=True, slots=True)
class Part:
    """One suite under one protocol: a row of the results.

    Attributes:
        suite: what is asked.
        protocol: how.
    """

    suite: Suite
    protocol: Protocol

    @property
    def name(self) -> str:
        """The suite's own name for what nothing is drawn of, else SUITE@PROTOCOL."""
        drawn = self.protocol.temperature > 0
        return f"{self.suite.name}@{self.protocol.name}" if drawn else self.suite.name


@dataclass(frozen=True, slots=True)
class Request:
    """One completion that is wanted.

    Attributes:
        part: where it belongs.
        example: the question.
        prompt: what the model is given; the example's own but for the variant `chat`.
        sample: counts the completions of one prompt from 0.
        key: hash of everything that the answer depends on.
    """

    part: Part
    example: Example
    prompt: str
    sample: int
    key: str

    @property
    def seed(self) -> int:
        """Of this request alone, so that its answer does not depend on what is asked beside it."""
        return int(self.key, 16) % 2**31

    def row(self, completion: Completion, seconds: float, logprobs: Sequence[float] = ()) -> dict[str, Any]:
        """The answered request as a line of the journal."""
        return {
            "suite": self.part.name,
            "id": self.example.id,
            "sample": self.sample,
            "prompt": self.prompt,
            "answer": self.example.answer,
            "completion": completion.text,
            "num_tokens": completion.num_tokens,
            "finished": completion.finished,
            "seconds": round(seconds, 6),
            **({"logprobs": list(logprobs)} if logprobs else {}),
            "request": self.key,
        }

    def again(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A line of a former start as this request's: what the answer does not depend on, e.g. the right answer, is as it is now."""
        now = {"suite": self.part.name, "id": self.example.id, "sample": self.sample, "prompt": self.prompt}
        return {**row, **now, "answer": self.example.answer}


def parts_of(suites: Sequence[Suite], protocols: Sequence[Protocol]) -> list[Part]:
    """Every suite under every protocol; suites of multiple choice once, and those that a judge decides with one completion an example."""
    found: list[Part] = []
    for suite in suites:
        hows = (CHOICES,) if suite.choices else protocols
        if suite.grader == JUDGED:
            hows = [replace(how, n=1, k=None) for how in hows]
        found += [Part(suite, how) for how in hows]
    return found


def requests_of(part: Part, prompts: Sequence[str], *, model: str, backend: str) -> list[Request]:
    """All requests of a part, the completions of one prompt beside each other.

    Args:
        part: one suite under one protocol.
        prompts: of its examples.
        model: fingerprint of the model.
        backend: name of what runs it.
    """
    how = asdict(part.protocol)
    for name in ("n", "k", "name"):  # the answer to one request does not depend on how many there are
        del how[name]
    found: list[Request] = []
    for example, prompt in zip(part.suite.examples, prompts, strict=True):
        for sample in range(part.protocol.n):
            parts = [model, backend, how, part.suite.name, part.suite.choices, example.id, prompt, sample]
            key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
            found.append(Request(part, example, prompt, sample, key))
    return found


class Journal:
    """The answers so far.

    Args:
        path: `samples.jsonl`; lines of it that are damaged are dropped.
        wanted: keys of the requests of this evaluation.
        beside: lines of other suites that stay in the file.
        aside: file of the answers that no result counts now; lines of `path` that nobody wants are put there, wanted ones come from there. None = they are dropped.
    """

    def __init__(
        self,
        path: Path,
        wanted: Iterable[str],
        *,
        beside: Sequence[Mapping[str, Any]] = (),
        aside: Path | None = None,
    ):
        self._path = path
        keys, stay = set(wanted), {row["request"] for row in beside}
        self.rows: dict[str, dict[str, Any]] = {}
        spare: dict[str, dict[str, Any]] = {}
        for file in ([aside] if aside else []) + [path]:
            for row in whole_rows(file):
                key = row["request"]
                if key in keys:
                    self.rows[key] = row
                elif key not in stay:
                    spare[key] = {name: x for name, x in row.items() if name not in _OF_A_VERDICT}
        if aside is not None and spare:  # first, so that an answer is never in neither file
            write_whole(aside, _lines(spare.values()))
        write_whole(path, _lines([*beside, *self.rows.values()]))
        if aside is not None and not spare:
            aside.unlink(missing_ok=True)
        if self.rows:
            log.info("%d answers of a former start are kept", len(self.rows))

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write down answers; they survive what comes after."""
        self.rows.update((row["request"], dict(row)) for row in rows)
        with named(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(_lines(rows))
            file.flush()
            os.fsync(file.fileno())


def former_keys(folder: Path, wanted: set[str]) -> set[str]:
    """The wanted requests that have an answer in a result's folder."""
    files = (folder / OTHERS, folder / SAMPLES)
    return {row["request"] for file in files for row in whole_rows(file) if row["request"] in wanted}


def whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that hold an answer, one at a time; a warning counts those that do not. None where there is no such file."""
    damaged = 0
    if not path.is_file():
        return
    # Bytes, because a file that was cut off may end within a character.
    with path.open("rb") as lines:
        for line in lines:
            row = _row(line)
            if row is not None:
                yield row
            else:
                damaged += bool(line.strip())
    if damaged:
        log.warning("%s has %d damaged line(s): what they answered is asked again", path, damaged)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row: Any = json.loads(line, parse_constant=constant)
        return row if isinstance(row["completion"], str) and isinstance(row["request"], str) else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
