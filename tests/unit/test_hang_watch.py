"""Who hangs is found and named by the others: threads for ranks, torch's own store between them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from asft_nemo import hang_watch
from asft_nemo.hang_watch import HangWatch, Place, watched

pytestmark = pytest.mark.timeout(60)

SECONDS = 1.0
AGAIN = "start the run again"


class Ranks:
    """Watches of several ranks, and what they said."""

    def __init__(self, number: int):
        self.store, self.said, self.ended = torch.distributed.HashStore(), list[str](), threading.Event()
        self.watches = [
            HangWatch(rank, number, SECONDS, lambda: self.store, again=AGAIN, end=self.end)
            for rank in range(number)
        ]

    def end(self, error: Exception) -> NoReturn:
        self.said.append(str(error))
        self.ended.set()
        raise SystemExit

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            self.watches[rank].start()

    def at(
        self, *ranks: int, doing: str = "step 3", waits: bool = False, may_take_long: bool = False
    ) -> None:
        for rank in ranks:
            self.watches[rank].at(doing, waits=waits, may_take_long=may_take_long)


@pytest.fixture
def three() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    end_of(*ranks.watches)


def end_of(*watches: HangWatch) -> None:
    """Their threads are gone: none talks into another test's output, or is counted there."""
    for watch in watches:
        watch._stopped.set()
    for watch in watches:
        for thread in watch._threads:
            if thread.is_alive():
                thread.join(timeout=20)
                assert not thread.is_alive()


def silenced(watch: HangWatch) -> None:
    """A process that is stopped: it leaves no sign, not even the one of a rank that has ended well."""
    watch._leave_sign = lambda count: None  # type: ignore[method-assign]


def test_a_silent_rank_is_named_by_the_one_before_it(three: Ranks) -> None:
    """Also where it may take long."""
    three.start(0, 1, 2)
    time.sleep(SECONDS)
    assert not three.said
    silenced(three.watches[2])
    assert three.ended.wait(5 * SECONDS)
    assert three.said[0].startswith(
        f"rank 2 (process {os.getpid()} on {socket.gethostname()}) hangs in its start: "
    )
    assert re.search(
        r"nothing has come from it for \d+ s, and the other ranks wait for it; look after", three.said[0]
    )
    assert f"and {AGAIN}; alarms.hang_seconds says how long is waited" in three.said[0]


def test_a_connection_that_breaks_is_made_again(three: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is named for it, neither the store nor the rank, and who hangs later is found."""

    class Broken:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def set(self, key: str, value: str) -> None:
            raise self.error

    reset = torch.distributed.DistNetworkError("reset by peer")  # pyright: ignore[reportPrivateImportUsage]
    met = iter([three.store, Broken(reset), Broken(ValueError("reset by peer")), three.store])
    three.watches[1]._meet = lambda: next(met)
    three.watches[1]._pause = (
        SECONDS / 20
    )  # three times in a row it gives no sign: far less than SECONDS on a busy machine, too
    three.start(0, 1, 2)
    time.sleep(SECONDS / 2)
    three.watches[1]._store = Broken(reset)
    assert not three.ended.wait(3 * SECONDS)
    assert caplog.text.count("the connection to the ranks' store is made again (reset by peer)") == 3
    silenced(three.watches[2])
    assert three.ended.wait(6 * SECONDS)
    assert three.said[0].startswith("rank 2 (process ")


def test_a_rank_that_never_came_is_named_and_has_longer(three: Ranks) -> None:
    three.start(0, 1)
    assert not three.ended.wait(2 * SECONDS)
    assert three.ended.wait(5 * SECONDS)
    assert three.said[0].startswith("rank 2 hangs before its first sign: ")


def test_a_rank_that_stays_behind_is_named_though_it_gives_signs(three: Ranks) -> None:
    three.start(0, 1, 2)
    three.at(0, 1, 2, waits=True)
    three.at(0, 2, waits=True)
    assert three.ended.wait(6 * SECONDS)
    assert three.said[0].startswith("rank 1 (process ")
    assert re.search(r"hangs in step 3: it has been there for \d+ s,", three.said[0])


def test_all_that_stay_behind_at_one_place_are_named(three: Ranks) -> None:
    three.start(0, 1, 2)
    three.at(0, 1, 2, waits=True)
    three.at(0, waits=True)
    assert three.ended.wait(6 * SECONDS)
    assert three.said[0].startswith("rank 1 (process ")
    assert " and rank 2 (process " in three.said[0]


@pytest.mark.parametrize("where", ["all at one place", "behind a step", "may take long", "goes on", "done"])
def test_nobody_is_named_where_nobody_hangs(three: Ranks, where: str) -> None:
    """A slow step of all, a checkpoint that takes long on one rank, a slow load, a slow replica of the model, ranks that end one after another."""
    three.start(0, 1, 2)
    three.at(0, 1, 2, waits=where == "all at one place", may_take_long=where == "may take long")
    if where == "behind a step":
        three.at(0, 2)
    if where in ("may take long", "goes on"):
        for _ in range(9):
            three.at(0, 2, waits=True)
    if where == "done":
        three.watches[1].stop()
    for _ in range(8):
        assert not three.ended.wait(SECONDS / 2)
        if where == "goes on":
            three.at(1, doing="another pass", waits=True)


def test_who_waits_for_one_that_may_take_long_is_let_be(three: Ranks) -> None:
    """The end of a cache: rank 1 had a pass less to do than the others, and rank 2 closes its part for as long as it takes."""
    three.at(0, 1, 2, doing="pass 1", waits=True)
    three.at(0, 2, doing="pass 2", waits=True)
    three.at(0, 2, doing="reading the examples of pass 3")
    three.at(0, 1, 2, doing="closing its part of the cache", may_take_long=True)
    three.at(0, 1, doing="waiting for the others' parts", waits=True)
    three.start(0, 1, 2)
    assert not three.ended.wait(4 * SECONDS)


@pytest.fixture
def of_two_attempts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """Ranks 0 and 1 on machines of which torchrun ended the first one's rank, and the other's for it; the store has what they left."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    ranks = Ranks(0)
    for rank in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        before = HangWatch(rank, 2, SECONDS, lambda: ranks.store, again=AGAIN, end=ranks.end)
        before._store, before._place = ranks.store, Place(9, "step 9", True, False, 0.0)
        before._leave_sign(99)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(1 - rank))
        ranks.watches.append(HangWatch(rank, 2, SECONDS, lambda: ranks.store, again=AGAIN, end=ranks.end))
    yield ranks
    end_of(*ranks.watches)


def test_attempts_that_machines_count_differently_are_one(of_two_attempts: Ranks) -> None:
    of_two_attempts.start(0, 1)
    assert not of_two_attempts.ended.wait(5 * SECONDS)
    silenced(of_two_attempts.watches[1])
    assert of_two_attempts.ended.wait(5 * SECONDS)
    assert of_two_attempts.said[0].startswith(f"rank 1 (process {os.getpid()} on ")


def test_what_a_rank_left_in_the_attempt_before_is_no_sign_of_it(of_two_attempts: Ranks) -> None:
    """It has as long to come as any other."""
    of_two_attempts.start(0)
    assert not of_two_attempts.ended.wait(2 * SECONDS)
    assert of_two_attempts.ended.wait(5 * SECONDS)
    assert of_two_attempts.said[0].startswith("rank 1 hangs before its first sign: ")


def test_who_is_slow_in_a_start_is_told(three: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        three.at(0, 1, 2, doing="loading the base", may_take_long=True)
        three.at(0, 2, doing="building", may_take_long=True)
        three.start(0, 1, 2)
        assert not three.ended.wait(3 * SECONDS)
    assert re.search(r"is in loading the base: for \d+ s, and the other ranks are further", caplog.text)
    assert "rank 1 (process " in caplog.text
    assert "rank 2" not in caplog.text


def test_a_rank_that_was_stopped_itself_accuses_nobody(three: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that Slurm suspends and lets go on: whoever wakes first has heard nothing for hours."""
    suspended = 0.0  # seconds, on the clock of all
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + suspended, sleep=time.sleep)
    monkeypatch.setattr(hang_watch, "time", clock)
    three.start(0, 1, 2)
    time.sleep(SECONDS)
    for watch in three.watches:
        watch._leave_sign, watch.kept = lambda count: None, watch._leave_sign  # type: ignore[method-assign, attr-defined]
    suspended = 100 * SECONDS
    time.sleep(SECONDS / 2)
    for watch in three.watches:
        watch._leave_sign = watch.kept  # type: ignore[method-assign, attr-defined]
    assert not three.ended.wait(3 * SECONDS)


def test_an_end_waits_for_the_call_that_a_thread_is_in(three: Ranks) -> None:
    """Python cannot end within one: the process would abort."""
    three.watches[1]._leave_sign = lambda count: time.sleep(1.5 * SECONDS)  # type: ignore[method-assign]
    three.start(1)
    three.watches[1].stop()
    assert not three.watches[1]._threads[0].is_alive()


def keep_a_store(out: Any) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    out.send(store.port)
    time.sleep(60)


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        ("False", "rank 0 (process 7 on a) hangs in its start: the ranks' store there has not answered for "),
        ("True", "machine_1, the first machine, hangs: the ranks' store there has not answered for "),
    ],
)
def test_a_store_that_does_not_answer_names_who_keeps_it(
    agent: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that keeps it is stopped: no call to it comes back."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    monkeypatch.setenv("MASTER_ADDR", "machine_1")
    told, tells = multiprocessing.Pipe(duplex=False)
    keeper = multiprocessing.get_context("fork").Process(target=keep_a_store, args=(tells,), daemon=True)
    keeper.start()
    found, ended = list[str](), threading.Event()

    def end(error: Exception) -> Any:
        found.append(str(error))
        ended.set()
        raise SystemExit

    try:
        port = told.recv()

        def meet() -> Any:
            return torch.distributed.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)

        meet().set(
            "asft_sign_0_0",
            '{"count": 1, "place": 0, "doing": "its start", "may_take_long": true, "seconds": 1, "process": 7, "host": "a"}',
        )
        watch = HangWatch(1, 2, 20.0, meet, again=AGAIN, end=end)
        watch._seconds, watch._pause = (
            2.0,
            0.2,
        )  # rank 0 leaves no further sign here: that is not what is found
        watch._look_for_those_behind = lambda *_: None  # type: ignore[method-assign]
        watch.start()
        until = time.monotonic() + 20
        while watch._keeper is None and time.monotonic() < until:
            time.sleep(0.01)
        assert keeper.pid is not None
        os.kill(keeper.pid, signal.SIGSTOP)
        assert ended.wait(20)
        assert found[0].startswith(said)
        watch._stopped.set()  # else it would look for a store that is no more
    finally:
        keeper.kill()
        keeper.join()
    end_of(watch)


@pytest.mark.parametrize(("seconds", "ranks"), [(None, 4), (600.0, 1)])
def test_it_can_be_switched_off_and_one_rank_has_no_thread(seconds: float | None, ranks: int) -> None:
    before = set(threading.enumerate())  # of which one may end meanwhile
    with watched(seconds, ranks=ranks, again=AGAIN):
        assert set(threading.enumerate()) <= before
