"""What a campaign tried and found: a row a fault, counted, told while it goes on, written as JSON and as a table."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = "fault_campaign.json"
SAME, REFUSED, RESUMED, VIOLATION = "same", "refused", "resumed", "violation"


@dataclass(frozen=True)
class Row:
    """One fault and what became of it.

    Attributes:
        name: what `--only` takes; the same fault in every campaign of the same seed.
        kind: what was done, for example `truncated`.
        artefact: to what.
        place: where in it, for example a file and a byte.
        moment: the command that came next, or that was disturbed.
        expected: the invariant.
        outcome: one of this module's words.
        sentence: what the command said.
        seconds: it took.
        problem: why this is a violation; empty otherwise.
    """

    name: str
    kind: str
    artefact: str
    place: str
    moment: str
    expected: str
    outcome: str
    sentence: str
    seconds: float
    problem: str = ""

    @property
    def violated(self) -> bool:
        """Whether the invariant was broken."""
        return self.outcome == VIOLATION


@dataclass
class Book:
    """Rows as they come, and how many are still to come."""

    seed: int
    planned: int
    rows: list[Row] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def add(self, row: Row) -> None:
        """Notes a fault, and says so on a terminal or every tenth time."""
        self._put(row)
        if row.violated:
            print(f"VIOLATION {row.name}: {row.problem}\n  said: {row.sentence}", file=sys.stderr)
            print(f"  again: --seed {self.seed} --only '{row.name}'", file=sys.stderr, flush=True)
        if len(self.rows) % 10 == 0 or len(self.rows) == self.planned or row.seconds > 10:
            spent = time.monotonic() - self.started
            left = spent / len(self.rows) * (self.planned - len(self.rows))
            print(
                f"{len(self.rows)} of {self.planned} faults, {self.violations} violations, {spent:.0f} s, about {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def join(self, folder: Path, names: Collection[str]) -> None:
        """Puts the rows of an earlier part of the campaign in front, of those faults that are still in it."""
        values = json.loads((folder / FILE).read_text())
        if values["seed"] != self.seed:
            raise ValueError(f"{folder} is of seed {values['seed']}, this is {self.seed}")
        found = [Row(**row) for row in values["rows"] if row["name"] in names]
        before = len(self.rows)
        for row in found:
            self._put(row)
        self.planned += len(self.rows) - before
        self.started -= values["seconds"]

    def _put(self, row: Row) -> None:
        """In place of an earlier one of the same fault."""
        self.rows = [one for one in self.rows if one.name != row.name] + [row]

    @property
    def violations(self) -> int:
        """Broken invariants so far."""
        return sum(row.violated for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "seed": self.seed,
            "faults": len(self.rows),
            "violations": self.violations,
            "seconds": round(time.monotonic() - self.started, 1),
            "outcomes": dict(Counter(row.outcome for row in self.rows)),
            "rows": [asdict(row) for row in self.rows],
        }

    def write(self, folder: Path, *, called: str, notes: Sequence[str]) -> None:
        """Writes `fault_campaign.json` and `.md`.

        Args:
            folder: where.
            called: the command line.
            notes: sentences about this machine and how faults were made on it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        values = {"command": called, "notes": list(notes), **self.to_json()}
        (folder / FILE).write_text(json.dumps(values, indent=1) + "\n")
        (folder / "fault_campaign.md").write_text(self.page(called, notes))

    def page(self, called: str, notes: Sequence[str]) -> str:
        """The table as markdown: totals by kind and artefact, then every row."""
        told = self.to_json()
        head = [
            "# Fault campaign",
            "",
            f"`{called}`: {told['faults']} faults, {told['violations']} violations, {told['seconds']:.0f} s.",
            "",
            *(f"* {note}" for note in notes),
            "",
            *summary(self.rows),
            "",
        ]
        names = ("fault", "place", "next command", "outcome", "said", "s")
        cells = [
            (
                row.name,
                row.place,
                row.moment,
                (row.problem and f"**{row.problem}**") or row.outcome,
                row.sentence,
                f"{row.seconds:.1f}",
            )
            for row in self.rows
        ]
        return "\n".join([*head, *_table(names, cells)]) + "\n"


def summary(rows: Iterable[Row]) -> list[str]:
    """Lines of a table: artefact by outcome."""
    rows = list(rows)
    outcomes = (SAME, RESUMED, REFUSED, VIOLATION)
    cells = []
    for artefact in dict.fromkeys(row.artefact for row in rows):
        mine = [row for row in rows if row.artefact == artefact]
        kinds = ", ".join(dict.fromkeys(row.kind for row in mine))
        counts = Counter(row.outcome for row in mine)
        cells.append((artefact, kinds, str(len(mine)), *(str(counts[outcome]) for outcome in outcomes)))
    counts = Counter(row.outcome for row in rows)
    cells.append(("all", "", str(len(rows)), *(str(counts[outcome]) for outcome in outcomes)))
    return _table(("artefact", "kinds", "faults", *outcomes), cells)


def _table(names: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    def line(words: Sequence[str]) -> str:
        return "| " + " | ".join(word.replace("|", "\\|").replace("\n", " ") for word in words) + " |"

    return [line(names), "|" + "---|" * len(names), *map(line, cells)]
