"""From a Chrome trace, as torch's profiler writes it, to the timeline of a step.

Read are the fields that Kineto (torch 2.x) writes: the categories ``cpu_op``, ``user_annotation``, ``cuda_runtime`` and ``cuda_driver``,
``kernel``, ``gpu_memcpy`` and ``gpu_memset``; a kernel and the call that launched it share ``args.correlation``.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asft_nemo.profiling.breakdown import OTHER, PIPELINE, RING, Stay, Timeline, Transfer, Work
from asft_nemo.profiling.rooms import FROZEN_MODEL, PREFIX, ROOMS

Event = Mapping[str, Any]

STEP = PREFIX + "step"
_ROOM_OF = {PREFIX + room: room for room in ROOMS}
# While a model computes its stage exchanges nothing with others: Megatron's schedules do so before and after.
_COMPUTES = {PREFIX + name for name in ("forward", "backward", FROZEN_MODEL)}
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
# part of a kernel's name -> kind of transfer; the first match counts. Userbuffers are Transformer Engine's tensor-parallel exchanges.
_KINDS = (
    ("AllReduce", "all_reduce"),
    ("AllGather", "all_gather"),
    ("ReduceScatter", "reduce_scatter"),
    ("SendRecv", PIPELINE),  # or `RING`
    ("AllToAll", "all_to_all"),
    ("Broadcast", "broadcast"),
    ("Reduce", "reduce"),
    ("userbuffers", "userbuffers"),
)
_NCCL = re.compile(r"^nccl|userbuffers")
_GLOO = "gloo:"
_ELEMENT_BYTES = {
    "Byte": 1, "Char": 1, "Bool": 1, "Float8_e4m3fn": 1, "Float8_e5m2": 1,
    "Half": 2, "BFloat16": 2, "Short": 2, "Int": 4, "Float": 4, "Long": 8, "Double": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Operator:
    """What one operator or kernel cost in a step: calls, and seconds without those of operators it calls."""

    name: str
    count: float
    seconds: float


def timeline(events: Sequence[Event]) -> Timeline:
    """The timeline of the one step in a trace.

    Args:
        events: ``traceEvents``; one of them is the range `STEP`.

    Raises:
        ValueError: there is no such range.
    """
    events = [event for event in events if event.get("ph") == "X"]
    step = next((event for event in events if event["name"] == STEP and _is(event, "user_annotation")), None)
    if step is None:
        raise ValueError(f"no range {STEP} in this trace")
    start, end = _times(step)
    stays = [
        Stay(*_times(event), _ROOM_OF[event["name"]])
        for event in events
        if _is(event, "user_annotation") and event["name"] in _ROOM_OF
    ]
    on_device = any(_is(event, *_ON_DEVICE) for event in events)
    work, transfers = _of_device(events, stays) if on_device else _of_host(events, step["tid"])
    return Timeline(start, end, stays, list(work), list(transfers), on_device)


def operators(events: Sequence[Event]) -> list[Operator]:
    """Operators of a step, the dearest first: kernels where there is a device, else host operators of all threads."""
    events = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in events if _is(event, *_ON_DEVICE)]
    found: dict[str, list[int]] = defaultdict(list)
    if kernels:
        for event in kernels:
            start, end = _times(event)
            found[event["name"]].append(end - start)
    else:
        for name, own in _own_times(event for event in events if _is(event, "cpu_op")):
            found[name].append(own)
    ranked = (Operator(name, len(times), sum(times) / 1e9) for name, times in found.items())
    return sorted(ranked, key=lambda one: (-one.seconds, one.name))


def _of_device(events: Sequence[Event], stays: Sequence[Stay]) -> tuple[list[Work], list[Transfer]]:
    """Kernels and copies, by the room in which they were launched (backward's are launched by autograd's own thread).

    NCCL has one kernel for messages between pipeline stages and for the ring in which Transformer Engine's attention exchanges keys and
    values of context-parallel ranks: one that a model launched while it computed is the ring's.
    """
    launched = {
        event["args"]["correlation"]: _times(event)[0]
        for event in events
        if _is(event, *_LAUNCHES) and "correlation" in event.get("args", {})
    }
    rooms = _Rooms(stays)
    computing = _Rooms(
        [
            Stay(*_times(event), event["name"])
            for event in events
            if _is(event, "user_annotation") and event["name"] in _COMPUTES
        ]
    )
    work, transfers = [], []
    for event in events:
        if not _is(event, *_ON_DEVICE):
            continue
        start, end = _times(event)
        arguments = event.get("args", {})
        asked = launched.get(arguments.get("correlation"))
        asked = start if asked is None else asked
        room = rooms.at(asked) or OTHER
        if _NCCL.search(event["name"]):
            kind = _kind_of_kernel(event["name"])
            kind = RING if kind == PIPELINE and computing.at(asked) else kind
            transfers.append(Transfer(start, end, kind, _message_bytes(arguments), room))
        else:
            work.append(Work(start, end, room))
    return work, transfers


def _of_host(events: Sequence[Event], thread: Any) -> tuple[list[Work], list[Transfer]]:
    """Operators of the step's own thread that call no other, and what gloo's threads exchange.

    An operator that calls another may wait for it (a collective's does), so only its callees count.
    """
    mine = sorted(
        (event for event in events if _is(event, "cpu_op") and event["tid"] == thread),
        key=lambda event: (_times(event)[0], -_times(event)[1]),
    )
    work = []
    for event, following in zip(mine, [*mine[1:], None], strict=True):
        start, end = _times(event)
        leaf = following is None or _times(following)[0] >= end
        if leaf and not event["name"].startswith("c10d::"):
            work.append(Work(start, end))
    transfers = [
        Transfer(*_times(event), _kind_of_gloo(event["name"]))
        for event in events
        if event["name"].startswith(_GLOO)
    ]
    return work, transfers


def _kind_of_kernel(name: str) -> str:
    return next((kind for part, kind in _KINDS if part.lower() in name.lower()), "other")


def _kind_of_gloo(name: str) -> str:
    """Kind of a transfer on a CPU, where attention gathers keys and values and has no ring (`asft_nemo.nemo.context_parallel`)."""
    kind = name.removeprefix(_GLOO)
    return PIPELINE if kind in ("send", "recv") else kind


def _message_bytes(arguments: Event) -> int | None:
    """Bytes of a collective's larger side, from what NCCL's process group told the profiler."""
    counts = [arguments.get(f"{side} msg nelems") for side in ("In", "Out")]
    size = _ELEMENT_BYTES.get(str(arguments.get("dtype")))
    known = [count for count in counts if isinstance(count, int)]
    return max(known) * size if known and size else None


class _Rooms:
    """Which room the host was in at a time: the innermost."""

    def __init__(self, stays: Sequence[Stay]):
        self._stays = sorted(stays, key=lambda stay: (stay.start, -stay.end))
        self._starts = [stay.start for stay in self._stays]

    def at(self, time: int) -> str | None:
        """The room, None for none. Rooms are nested at most one in another, so a few steps back suffice."""
        place = bisect.bisect_right(self._starts, time)
        for stay in reversed(self._stays[max(0, place - 8) : place]):
            if time < stay.end:
                return stay.room
        return None


def _own_times(events: Iterable[Event]) -> Iterator[tuple[str, int]]:
    """Each operator's time without that of the operators it calls, thread by thread."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        threads[event["tid"]].append(event)
    for thread in threads.values():
        thread.sort(key=lambda event: (_times(event)[0], -_times(event)[1]))
        own = [end - start for start, end in map(_times, thread)]
        callers: list[int] = []
        for place, event in enumerate(thread):
            start, end = _times(event)
            while callers and _times(thread[callers[-1]])[1] <= start:
                callers.pop()
            if callers:
                own[callers[-1]] -= end - start
            callers.append(place)
        yield from zip((event["name"] for event in thread), own, strict=True)


def _is(event: Event, *categories: str) -> bool:
    return event.get("cat") in categories


def _times(event: Event) -> tuple[int, int]:
    """Start and end in ns; the trace has microseconds with three decimals."""
    start = round(event["ts"] * 1000)
    return start, start + round(event["dur"] * 1000)
