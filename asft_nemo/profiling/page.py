"""What a profile says, as JSON and as a page for a human."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from asft_nemo.profiling.breakdown import ACTIVITIES, OTHER, PIPELINE, RING, Breakdown
from asft_nemo.profiling.rooms import ROOMS
from asft_nemo.profiling.trace import Operator

TOP_OPERATORS = 10
_LONGEST_NAME = 90  # kernels' names are C++ templates

# What the page shows of a step, in its order, and whose sum is the step.
_WORDS = {
    "reference": "reference: the frozen models' passes ahead of the step",
    "forward": "forward, without the loss",
    "loss": "loss: the head's products and the objective",
    "backward": "backward, with what is recomputed in it",
    "optimizer": "optimizer",
    "data": "data: taking micro batches and moving them",
    OTHER: "other",
    "communication": "exposed communication: collectives, and attention's ring, that no work hides",
    "wait": "pipeline wait: messages between stages that no work hides, and the bubble",
    "idle": "idle: the GPU has nothing to do",
}

# kinds of transfers that need more than their own name
_KINDS = {PIPELINE: "send and receive, between stages", RING: "send and receive, within attention"}


@dataclass(frozen=True)
class RankProfile:
    """What one rank found out.

    Attributes:
        rank: global.
        place: its ranks in the groups, for example ``TP 0, PP 1, DP 0, CP 0``.
        steps: numbers of the profiled steps.
        step_seconds: of each of them.
        parts: the mean step's seconds: work by room, and what was not work by what it was; they add up to the step.
        communication: seconds in which collectives or attention's ring were under way, hidden or not.
        traffic: by kind of transfer: `count`, `seconds`, `nbytes` (None where unknown) per step.
        rooms: room -> activity -> seconds, of which `parts` are the sums.
        operators: the dearest, per step.
        peak_bytes: the most the device's allocator (0 on a CPU) and the process ever had since the run began.
        run: what ran: layout, precision, versions, device.
        speed: what metrics.jsonl says of the mean step's operations, on the rank that writes it; empty elsewhere.
    """

    rank: int
    place: str
    steps: list[int]
    step_seconds: list[float]
    parts: dict[str, float]
    communication: float
    traffic: dict[str, dict[str, float | None]]
    rooms: dict[str, dict[str, float]]
    operators: list[dict[str, Any]]
    peak_bytes: dict[str, int]
    run: dict[str, str]
    speed: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of the mean step."""
        return sum(self.step_seconds) / len(self.step_seconds)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"seconds": self.seconds, **asdict(self)}


def parts_of(whole: Breakdown) -> dict[str, float]:
    """The rows of the page: work by room, then exposed communication, wait and idle. They add up to the step."""
    work = {room: whole.of_room(room) for room in (*ROOMS, OTHER)}
    return {**work, **{activity: whole.of_activity(activity) for activity in ACTIVITIES[1:]}}


def rooms_of(whole: Breakdown) -> dict[str, dict[str, float]]:
    """Every room's seconds of each activity."""
    return {
        room: {activity: whole.parts.get((room, activity), 0.0) for activity in ACTIVITIES}
        for room in (*ROOMS, OTHER)
    }


def mean_operators(steps: Sequence[Sequence[Operator]]) -> list[Operator]:
    """The dearest operators of the mean step."""
    totals: dict[str, tuple[float, float]] = {}
    for operator in (one for step in steps for one in step):
        count, seconds = totals.get(operator.name, (0.0, 0.0))
        totals[operator.name] = (count + operator.count / len(steps), seconds + operator.seconds / len(steps))
    ranked = (Operator(name, count, seconds) for name, (count, seconds) in totals.items())
    return sorted(ranked, key=lambda one: (-one.seconds, one.name))[:TOP_OPERATORS]


def rank_page(profile: RankProfile) -> str:
    """The page of one rank, Markdown."""
    spread = ", ".join(
        f"{step}: {seconds:.4f}" for step, seconds in zip(profile.steps, profile.step_seconds, strict=True)
    )
    sections = [
        f"# Rank {profile.rank} ({profile.place})",
        "\n".join(f"* {name}: {value}" for name, value in profile.run.items()),
        f"Mean step: **{profile.seconds:.4f} s** (seconds of step {spread}). {_peak(profile.peak_bytes)}",
        "## Where the step went\n\n" + _parts_table(profile),
        "## Communication\n\n" + _traffic_table(profile),
        "## By room\n\n" + _rooms_table(profile),
        f"## The {TOP_OPERATORS} dearest operators\n\n" + _operators_table(profile),
    ]
    if profile.speed:
        sections.insert(3, _speed_lines(profile.speed))
    return "\n\n".join(sections) + "\n"


def summary_page(profiles: Sequence[RankProfile], failed: Mapping[int, str]) -> str:
    """One line a rank, and which one the others wait for."""
    lines = ["# Profile", ""]
    if profiles:
        lines += [f"* {name}: {value}" for name, value in profiles[0].run.items()]
        lines += ["", _slowest(profiles), ""]
        rows = [
            [
                str(one.rank),
                one.place,
                f"{one.seconds:.4f}",
                *(f"{one.parts[part] / one.seconds:.0%}" for part in _WORDS),
                f"{max(one.peak_bytes.values()) / 2**30:.2f}",
            ]
            for one in profiles
        ]
        lines += [
            _table(["rank", "place", "s a step", *_WORDS, "peak GiB"], rows),
            "",
            "What the words mean, and more of each rank: `rank_R.md`. Traces for chrome://tracing or ui.perfetto.dev: `rank_R.trace.json.gz`.",
        ]
        lines += ["", *(_speed_lines(one.speed) for one in profiles if one.speed)]
    lines += [f"* rank {rank} wrote none: {why}" for rank, why in sorted(failed.items())]
    return "\n".join(lines).rstrip() + "\n"


def _slowest(profiles: Sequence[RankProfile]) -> str:
    """All ranks take as long as the step; the slowest is the one that waits least."""
    waits = {
        one.rank: (one.parts["communication"] + one.parts["wait"] + one.parts["idle"]) for one in profiles
    }
    slowest = min(profiles, key=lambda one: (waits[one.rank], one.rank))
    if len(profiles) == 1:
        return f"One rank; it has no work to do for {waits[slowest.rank]:.4f} s of a step."
    return (
        f"Slowest: rank {slowest.rank} ({slowest.place}), which works for {slowest.seconds - waits[slowest.rank]:.4f} s of a step and "
        "waits least for others."
    )


def _parts_table(profile: RankProfile) -> str:
    rows = [
        [_WORDS[part], f"{seconds:.4f}", f"{seconds / profile.seconds:.1%}"]
        for part, seconds in profile.parts.items()
    ]
    return _table(["", "s a step", "share"], [*rows, ["step", f"{profile.seconds:.4f}", "100.0%"]])


def _traffic_table(profile: RankProfile) -> str:
    hidden = profile.communication - profile.parts["communication"]
    said = (
        f"Collectives, and attention's ring, were under way for {profile.communication:.4f} s of a step, {max(hidden, 0.0):.4f} s of it while "
        "the rank worked."
    )
    if not profile.traffic:
        return "None."
    rows = [
        [
            _KINDS.get(kind, kind.replace("_", " ")),
            f"{one['count']:g}",
            f"{one['seconds']:.4f}",
            "unknown" if one["nbytes"] is None else f"{one['nbytes'] / 2**20:.2f}",
        ]
        for kind, one in profile.traffic.items()
    ]
    return said + "\n\n" + _table(["kind", "a step", "s under way", "MiB of messages"], rows)


def _rooms_table(profile: RankProfile) -> str:
    rows = [
        [room, *(f"{seconds:.4f}" for seconds in of_room.values())] for room, of_room in profile.rooms.items()
    ]
    return _table(["s a step", *ACTIVITIES], rows)


def _operators_table(profile: RankProfile) -> str:
    rows = [
        [
            f"`{one['name'][:_LONGEST_NAME]}`".replace("|", "\\|"),
            f"{one['count']:g}",
            f"{one['seconds']:.4f}",
            f"{one['seconds'] / profile.seconds:.1%}",
        ]
        for one in profile.operators
    ]
    return _table(["operator", "a step", "s", "of the step"], rows)


def _speed_lines(speed: Mapping[str, float]) -> str:
    return "\n".join(f"* {name}: {value:.4g}" for name, value in speed.items())


def _peak(peak_bytes: Mapping[str, int]) -> str:
    shown = ", ".join(f"{size / 2**30:.2f} GiB ({name})" for name, size in peak_bytes.items() if size)
    return f"Peak memory since the run began: {shown}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
