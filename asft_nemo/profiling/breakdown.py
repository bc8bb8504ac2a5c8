"""What a rank did with a step's time, from intervals.

Every instant of the step is one of four things, in this order of precedence:

* ``work``: an operator (a kernel, on a GPU) of ours runs;
* ``communication``: none does, but a collective is under way, or keys and values of attention on their way to other context-parallel
  ranks: the *exposed* part of communication;
* ``wait``: none does, but a message to or from another pipeline stage is: its transfer and, mostly, the pipeline's bubble;
* ``idle``: nothing of all that. On a CPU this is Python at work and counts as ``work``; on a GPU the device has nothing to do.

and belongs to the room in which it was asked for, or to ``other``. So all parts add up to the step, exactly: times are whole nanoseconds.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from asft_nemo.profiling.rooms import ROOMS

OTHER = "other"
ACTIVITIES = ("work", "communication", "wait", "idle")
PIPELINE = "send_recv"  # the only kind that is a wait
RING = "ring"


class Work(NamedTuple):
    """An operator or a kernel; times in ns. `room` None: the one the host is in while it runs."""

    start: int
    end: int
    room: str | None = None


class Transfer(NamedTuple):
    """A collective or an exchange of two ranks, between pipeline stages (`PIPELINE`) or in attention (`RING`). `nbytes` of the message, None where unknown."""

    start: int
    end: int
    kind: str
    nbytes: int | None = None
    room: str | None = None


class Stay(NamedTuple):
    """The host's stay in a room."""

    start: int
    end: int
    room: str


@dataclass(frozen=True)
class Timeline:
    """One step of one rank; times in ns.

    Attributes:
        start, end: the step.
        stays: the rooms; the innermost counts where they are nested.
        work: operators without those they call, or kernels; they may overlap.
        transfers: communication; they may overlap.
        on_device: times are a GPU's.
    """

    start: int
    end: int
    stays: Sequence[Stay]
    work: Sequence[Work]
    transfers: Sequence[Transfer]
    on_device: bool


@dataclass
class Traffic:
    """All transfers of one kind in a step.

    Attributes:
        count: how many began in it.
        seconds: under way, those at the same time counted once.
        nbytes: of their messages, None where it is not known of all.
    """

    count: float = 0
    seconds: float = 0.0
    nbytes: float | None = 0


@dataclass
class Breakdown:
    """Seconds of a step.

    Attributes:
        seconds: the whole step.
        parts: (room, activity) -> seconds; they add up to `seconds`.
        communication: seconds in which any transfer but those between stages was under way, overlapped by work or not.
        traffic: by kind of transfer.
    """

    seconds: float = 0.0
    parts: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    communication: float = 0.0
    traffic: dict[str, Traffic] = field(default_factory=lambda: defaultdict(Traffic))

    def of_room(self, room: str) -> float:
        """Seconds of work in a room."""
        return self.parts.get((room, "work"), 0.0)

    def of_activity(self, activity: str) -> float:
        """Seconds of an activity in all rooms."""
        return sum(seconds for (_, kind), seconds in self.parts.items() if kind == activity)


def breakdown(line: Timeline) -> Breakdown:
    """Shares out every instant of a step. Time: n log n in the number of intervals."""
    found = Breakdown(seconds=(line.end - line.start) / 1e9)
    parts: Counter[tuple[str, str]] = Counter()
    for start, end, active in _instants(line):
        parts[_part(active, line.on_device)] += end - start
    found.parts.update({part: time / 1e9 for part, time in parts.items()})
    found.communication = _covered(line, (one for one in line.transfers if one.kind != PIPELINE)) / 1e9
    within = [one for one in line.transfers if one.start < line.end and one.end > line.start]
    for kind in sorted({one.kind for one in within}):
        mine = [one for one in line.transfers if one.kind == kind and line.start <= one.start < line.end]
        sizes = [one.nbytes for one in mine]
        found.traffic[kind] = Traffic(
            count=len(mine),
            seconds=_covered(line, (one for one in line.transfers if one.kind == kind)) / 1e9,
            nbytes=None if any(size is None for size in sizes) else sum(size or 0 for size in sizes),
        )
    return found


def mean(steps: Sequence[Breakdown]) -> Breakdown:
    """The mean of several steps' breakdowns; one of no steps is empty."""
    whole = Breakdown()
    for one in steps:
        whole.seconds += one.seconds / len(steps)
        whole.communication += one.communication / len(steps)
        for part, seconds in one.parts.items():
            whole.parts[part] += seconds / len(steps)
        for kind, traffic in one.traffic.items():
            total = whole.traffic[kind]
            total.count += traffic.count / len(steps)
            total.seconds += traffic.seconds / len(steps)
            unknown = total.nbytes is None or traffic.nbytes is None
            total.nbytes = None if unknown else (total.nbytes or 0) + (traffic.nbytes or 0) / len(steps)
    return whole


def _instants(line: Timeline) -> Iterator[tuple[int, int, _Active]]:
    """The stretches of a step in which nothing begins or ends, each with what is going on in it."""
    changes = sorted(_changes(line), key=lambda change: change[0])
    active, now = _Active(), line.start
    for time, changed in itertools.groupby(changes, key=lambda change: change[0]):
        if time > now:
            yield now, time, active
            now = time
        for _, interval, begins in changed:
            active.change(interval, begins)
    if line.end > now:
        yield now, line.end, active


def _changes(line: Timeline) -> Iterator[tuple[int, Work | Transfer | Stay, bool]]:
    """Beginnings and ends within the step; an interval that reaches beyond it is cut."""
    for interval in itertools.chain(line.stays, line.work, line.transfers):
        start, end = max(interval.start, line.start), min(interval.end, line.end)
        if start < end:
            yield start, interval, True
            yield end, interval, False


class _Active:
    """What is going on at an instant."""

    def __init__(self) -> None:
        self.stays: list[Stay] = []
        self.work: Counter[str | None] = Counter()
        self.collectives: Counter[str | None] = Counter()
        self.messages: Counter[str | None] = Counter()

    def change(self, interval: Work | Transfer | Stay, begins: bool) -> None:
        """Something begins or ends."""
        if isinstance(interval, Stay):
            self.stays.append(interval) if begins else self.stays.remove(interval)
            return
        if isinstance(interval, Work):
            counter = self.work
        else:
            counter = self.messages if interval.kind == PIPELINE else self.collectives
        counter[interval.room] += 1 if begins else -1
        if not counter[interval.room]:
            del counter[interval.room]

    def here(self) -> str:
        """The innermost room the host is in."""
        if not self.stays:
            return OTHER
        return max(self.stays, key=lambda stay: (stay.start, -stay.end)).room

    def room_of(self, counter: Counter[str | None]) -> str:
        """Whose instant it is; where several rooms have something running, that of the first of them."""
        rooms = {self.here() if room is None else room for room in counter}
        return next((room for room in ROOMS if room in rooms), OTHER)


def _part(active: _Active, on_device: bool) -> tuple[str, str]:
    """The one part that an instant belongs to."""
    if active.work:
        return active.room_of(active.work), "work"
    if active.collectives:
        return active.room_of(active.collectives), "communication"
    if active.messages:
        return active.room_of(active.messages), "wait"
    return active.here(), "idle" if on_device else "work"


def _covered(line: Timeline, transfers: Iterable[Transfer]) -> int:
    """Time of the step that any of the transfers covers."""
    covered, reached = 0, line.start
    for one in sorted(transfers, key=lambda one: one.start):
        start, end = max(one.start, reached), min(one.end, line.end)
        if start < end:
            covered, reached = covered + end - start, end
    return covered
