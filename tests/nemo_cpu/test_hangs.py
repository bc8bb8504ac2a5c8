"""Who hangs is found and named by the others: threads for ranks, torch's own store between them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
import torch

from asft_nemo.nemo.hangs import HangWatch, hang_callbacks

pytestmark = [pytest.mark.nemo, pytest.mark.timeout(60)]

SECONDS = 1.0


class Ranks:
    """Watches of several ranks, and what they said."""

    def __init__(self, number: int):
        self.store, self.said, self.ended = torch.distributed.HashStore(), list[str](), threading.Event()
        self.watches = [HangWatch(rank, number, SECONDS, self.store, self.end) for rank in range(number)]

    def end(self, error: Exception) -> NoReturn:
        self.said.append(str(error))
        self.ended.set()
        raise SystemExit

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            self.watches[rank].start()

    def at(self, *ranks: int, waits: bool) -> None:
        for rank in ranks:
            self.watches[rank].at("step 3", waits=waits)


@pytest.fixture
def three() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    for watch in ranks.watches:
        watch.stop()


def silenced(watch: HangWatch) -> None:
    """A process that is stopped: it leaves no sign, not even the one of a rank that has ended well."""
    watch._leave_sign = lambda count: None  # type: ignore[method-assign]


def test_a_silent_rank_is_named_by_the_one_before_it(three: Ranks) -> None:
    three.start(0, 1, 2)
    time.sleep(SECONDS)
    assert not three.said
    silenced(three.watches[2])
    assert three.ended.wait(5 * SECONDS)
    assert three.said[0].startswith("rank 2 (process ")
    assert "hangs in its start: nothing has come from it for 1 s" in three.said[0]
    assert (
        "start the run again with trainer.resume=must; alarms.hang_seconds says how long is waited"
        in three.said[0]
    )


def test_a_rank_that_never_left_a_sign_is_named(three: Ranks) -> None:
    three.start(0, 1)
    assert three.ended.wait(5 * SECONDS)
    assert three.said[0].startswith("rank 2 hangs before training: ")


def test_a_rank_that_stays_behind_is_named_though_it_gives_signs(three: Ranks) -> None:
    three.start(0, 1, 2)
    three.at(0, 1, 2, waits=True)
    three.at(0, 2, waits=True)
    assert three.ended.wait(6 * SECONDS)
    assert three.said[0].startswith("rank 1 (process ")


@pytest.mark.parametrize("where", ["all at one place", "behind a step", "done"])
def test_nobody_is_named_where_nobody_hangs(three: Ranks, where: str) -> None:
    """A slow step of all, a checkpoint that takes long on one rank, and ranks that end one after another."""
    three.start(0, 1, 2)
    three.at(0, 1, 2, waits=where == "all at one place")
    if where == "behind a step":
        three.at(0, 2, waits=False)
    if where == "done":
        three.watches[1].stop()
    assert not three.ended.wait(4 * SECONDS)


def test_it_can_be_switched_off() -> None:
    kinds: list[Any] = [type(one).__name__ for one in hang_callbacks(600.0)]
    assert (hang_callbacks(None), kinds) == ([], ["HangCallback"])
