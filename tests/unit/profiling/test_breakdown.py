"""Every instant of a step is one thing in one room, whatever overlaps whatever."""

from __future__ import annotations

from collections import defaultdict

import hypothesis.strategies as st
import pytest
from hypothesis import given

from asft_nemo.profiling.breakdown import (
    OTHER,
    Breakdown,
    Stay,
    Timeline,
    Transfer,
    Work,
    breakdown,
    mean,
)
from asft_nemo.profiling.rooms import ROOMS

S = 10**9


def parts(
    *intervals: Stay | Work | Transfer, end: int = 10, on_device: bool = True
) -> dict[tuple[str, str], float]:
    """Of a step of `end` seconds; intervals in seconds."""
    scaled = [one._replace(start=one.start * S, end=one.end * S) for one in intervals]
    line = Timeline(
        0,
        end * S,
        [one for one in scaled if isinstance(one, Stay)],
        [one for one in scaled if isinstance(one, Work)],
        [one for one in scaled if isinstance(one, Transfer)],
        on_device,
    )
    return dict(breakdown(line).parts)


def test_an_empty_step_is_idle_on_a_device_and_python_on_a_cpu() -> None:
    assert parts() == {(OTHER, "idle"): 10}
    assert parts(on_device=False) == {(OTHER, "work"): 10}
    assert parts(Stay(2, 6, "data"), on_device=False) == {("data", "work"): 4, (OTHER, "work"): 6}


def test_the_innermost_room_counts() -> None:
    found = parts(Stay(0, 10, "forward"), Stay(4, 7, "loss"), on_device=False)
    assert found == {("forward", "work"): 7, ("loss", "work"): 3}


def test_a_room_in_one_of_the_same_beginning_is_the_inner_one() -> None:
    found = parts(Stay(0, 10, "forward"), Stay(0, 4, "loss"), on_device=False)
    assert found == {("forward", "work"): 6, ("loss", "work"): 4}


@pytest.mark.parametrize(
    ("work", "exposed"),
    [
        ([(0, 2)], 4),  # before it: all of it is exposed
        ([(2, 8)], 0),  # wholly hidden
        ([(0, 4)], 3),  # partly: 4 to 7
        ([(4, 5)], 3),  # in its middle
        ([(0, 4), (2, 5), (6, 9)], 1),  # several streams: 5 to 6
    ],
)
def test_only_what_no_work_hides_is_exposed(work: list[tuple[int, int]], exposed: int) -> None:
    found = parts(
        Transfer(3, 7, "all_reduce", room="backward"), *(Work(start, end, "backward") for start, end in work)
    )
    assert found.get(("backward", "communication"), 0) == exposed
    assert sum(found.values()) == 10


def test_a_message_between_stages_is_a_wait_and_a_collective_beside_it_is_communication() -> None:
    found = parts(Transfer(0, 8, "send_recv", room="forward"), Transfer(5, 10, "all_gather", room="data"))
    assert found == {("forward", "wait"): 5, ("data", "communication"): 5}


def test_a_kernel_belongs_to_the_room_that_launched_it_not_to_the_one_the_host_is_in() -> None:
    found = parts(Stay(0, 1, "forward"), Stay(1, 10, "backward"), Work(3, 9, "forward"))
    assert found == {("forward", "idle"): 1, ("backward", "idle"): 3, ("forward", "work"): 6}


def test_what_reaches_beyond_the_step_is_cut() -> None:
    assert parts(Work(-5, 3, "data"), Transfer(8, 20, "all_reduce", room="data")) == {
        ("data", "work"): 3,
        (OTHER, "idle"): 5,
        ("data", "communication"): 2,
    }


def test_traffic_counts_what_began_in_the_step_and_its_bytes_where_all_are_known() -> None:
    transfers = [
        Transfer(0, 4 * S, "all_reduce", 100),
        Transfer(2 * S, 6 * S, "all_reduce", 50),
        Transfer(7 * S, 8 * S, "send_recv", None),
        Transfer(-3 * S, 1 * S, "all_gather", 7),
        Transfer(-3 * S, -1 * S, "barrier", 7),
    ]
    found = breakdown(Timeline(0, 10 * S, [], [], transfers, on_device=True))
    reduced, sent, gathered = (found.traffic[kind] for kind in ("all_reduce", "send_recv", "all_gather"))
    assert (reduced.count, reduced.seconds, reduced.nbytes) == (2, 6, 150)
    assert (sent.count, sent.nbytes) == (1, None)
    assert (gathered.count, gathered.seconds) == (0, 1)
    assert "barrier" not in found.traffic
    assert found.communication == 6  # 0 to 6; messages between stages are not counted


def test_a_mean_of_steps_still_adds_up() -> None:
    steps = [
        Breakdown(seconds, defaultdict(float, {("loss", "work"): seconds - 1, (OTHER, "idle"): 1.0}))
        for seconds in (2.0, 6.0)
    ]
    whole = mean(steps)
    assert whole.seconds == sum(whole.parts.values()) == 4
    assert whole.of_room("loss") == 3


TIMES = st.tuples(st.integers(-20, 120), st.integers(0, 60)).map(lambda pair: (pair[0], sum(pair)))
ROOM = st.sampled_from([*ROOMS, OTHER])


@given(
    stays=st.lists(st.tuples(TIMES, st.sampled_from(ROOMS)), max_size=5),
    work=st.lists(st.tuples(TIMES, st.none() | ROOM), max_size=8),
    transfers=st.lists(
        st.tuples(TIMES, st.sampled_from(["all_reduce", "send_recv"]), st.none() | ROOM), max_size=8
    ),
    on_device=st.booleans(),
)
def test_the_parts_are_the_step(stays, work, transfers, on_device: bool) -> None:  # type: ignore[no-untyped-def]
    line = Timeline(
        0,
        100,
        [Stay(start, end, room) for (start, end), room in stays],
        [Work(start, end, room) for (start, end), room in work],
        [Transfer(start, end, kind, None, room) for (start, end), kind, room in transfers],
        on_device,
    )
    found = breakdown(line)
    in_ns = {part: round(seconds * S) for part, seconds in found.parts.items()}
    assert sum(in_ns.values()) == 100
    assert min(in_ns.values()) > 0
    worked = {
        now for start, end in (times for times, _ in work) for now in range(max(0, start), min(100, end))
    }
    collective, message = (
        {
            now
            for (start, end), kind, _ in transfers
            if kind == wanted
            for now in range(max(0, start), min(100, end))
        }
        for wanted in ("all_reduce", "send_recv")
    )
    by_activity = {
        activity: sum(time for (_, kind), time in in_ns.items() if kind == activity)
        for activity in ("communication", "wait")
    }
    assert by_activity == {
        "communication": len(collective - worked),
        "wait": len(message - worked - collective),
    }
