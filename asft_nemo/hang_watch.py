"""Ends a job in which a rank hangs, and says which: all others wait for it in a collective, and would until the process group's own time-out.

Every rank has a thread that leaves a sign in the store in which torch's ranks meet (no collective, no GPU) with how far the job has come there, and
looks after the sign of the rank behind it. It does so before there is a process group. Four things end the job:

* a rank that gave signs and gives none: its process is stopped, its machine is gone or out of memory, its interpreter is stuck;
* a rank that gives signs and has stood for as long at a place that others have left, who wait for it: it hangs in a read, or waits for what never comes;
* a rank that never gave a sign while others did, after three times as long: imports from a cold disk differ by minutes;
* a store that does not answer: the process that keeps it, torchrun's or rank 0's, is stopped, or its machine is gone.

At a place that may take long (a start: imports, building, reading weights; the end) silence alone counts. Who is behind there is told, and let be, and while
a rank is at one nobody else is ended for being behind: the passes of a cache are not as many on all ranks, and who has done fewer waits, behind the others. Where
all ranks stand at the same place nobody is named: that is a slow step, or a network that lost a message, and the process group's time-out is for it.

What keeps a healthy rank silent is a call that holds Python's interpreter lock, for the thread then waits like all of Python: loading a shared library
(`import`), starting CUDA, unpickling a checkpoint's metadata or one of its objects, a fork of a process with much memory, a collection of garbage. Such a call takes
seconds, a hundredth of the default. What takes minutes gives the lock back: files that are read and their CRC-32, torch's operations, copies and collectives.
Measured on two busy cores: 1.0 s of silence in a whole start of the tiny model, 0.3 s while Megatron's loader read 3 GB. A page of a mapped file that a file server
does not hand out for `alarms.hang_seconds` is a rank that hangs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage] # its public name

from asft_nemo.errors import UserError
from asft_nemo.leaving import give_up

logger = logging.getLogger(__name__)

_MOST_PAUSE = 5.0  # seconds between two signs
_FIRST_SIGN = 3  # times as long may the first one take
_LOOKS = 10  # at the ranks behind, while it is waited as long again
_NAMED = 8  # ranks that are at one place, at most
_LAST = -1  # the count of a rank that has done its work
_LAST_CALL = 10.0  # seconds: a process that ends while its thread is in a call to the store aborts; a store that does not answer is waited for no longer
_CURE = "look after that process and its machine (is it stopped, out of memory, waiting for a disk), and {again}; alarms.hang_seconds says how long is waited"


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        number: of places that it has passed.
        doing: what it does there.
        waits: whether it waits for the others there.
        may_take_long: whether it may stay there for ever, as long as it gives signs.
        since: when it came, by its own clock.
    """

    number: int
    doing: str
    waits: bool
    may_take_long: bool
    since: float


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself.

    Attributes:
        count: of its signs.
        place, doing, may_take_long: see `Place`.
        seconds: for how long it has been there.
        process, host: who it is.
    """

    count: int
    place: int
    doing: str
    may_take_long: bool
    seconds: float
    process: int
    host: str


class HangWatch:
    """The threads of one rank: one talks with the store, the other sees whether the store answers.

    Args:
        rank, ranks: this one's number, and how many there are.
        seconds: how long is waited.
        meet: opens the ranks' store, of this watch alone, for a call may wait.
        again: what the user is to do when the rank has been looked after.
        end: called with the sentence; never returns.
        job: tells the jobs of one store apart.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        seconds: float,
        meet: Callable[[], Any],
        *,
        again: str,
        end: Callable[[Exception], NoReturn] = give_up,
        job: int = 0,
    ):
        self._rank, self._ranks, self._seconds, self._meet, self._end = rank, ranks, seconds, meet, end
        self._cure, self._prefix = _CURE.format(again=again), f"asft_sign_{job}_"
        # torchrun keeps the store of the attempt before, and no key can tell attempts apart, for each machine counts only those that it ended itself.
        self._may_be_another_attempt = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        self._left_over: Sign | None = None  # what the next rank may have left in the attempt before
        self._pause = min(_MOST_PAUSE, seconds / 5)
        self._place = Place(0, "its start", False, True, time.monotonic())
        self._woke = self._looked = self._heard = self._began = time.monotonic()
        self._asked: float | None = None  # since when the store owes an answer
        self._last: Sign | None = None  # of the next rank
        self._keeper: Sign | None = None  # rank 0's first one
        self._count, self._told = 0, -seconds
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=work, daemon=True, name=f"hang watch {name}")
            for work, name in ((self._watch, "of ranks"), (self._watch_store, "of the store"))
        ]

    def start(self) -> None:
        """Begins to leave signs."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Leaves a last sign, and looks after nobody."""
        self._stopped.set()
        self._threads[0].join(timeout=_LAST_CALL)

    def at(self, doing: str, *, waits: bool = False, may_take_long: bool = False) -> None:
        """Says that this rank has come to the next place. All ranks pass the same places in the same order."""
        self._place = Place(self._place.number + 1, doing, waits, may_take_long, time.monotonic())

    def _watch(self) -> None:
        began = time.monotonic()
        try:
            self._store = self._meet()
        except DistError as error:
            self._nobody_there(error, time.monotonic() - began)
            return
        while not self._turns():
            try:  # a connection may break though all is well; a rank that leaves no signs would be named
                self._store = self._meet()
            except DistError as error:  # it lives with torchrun, whose end ends the ranks, or with rank 0
                if not self._stopped.is_set():
                    logger.warning(
                        "no hanging rank will be looked for any more: the ranks' store does not answer (%s)",
                        error,
                    )
                return

    def _turns(self) -> bool:
        """Until the watch is stopped, or the connection to the store breaks, which is False."""
        self._woke = self._heard = time.monotonic()
        try:
            while not self._stopped.is_set():
                self._asked = time.monotonic()
                self._turn()
                self._asked = None
                self._stopped.wait(self._pause)
            self._leave_sign(_LAST)
        except Exception as error:  # whatever it is: a rank that leaves no signs would be named
            self._asked = None
            if not self._stopped.wait(self._pause):
                logger.warning("the connection to the ranks' store is made again (%s)", error)
                return False
        return True

    def _turn(self) -> None:
        """Leaves a sign and looks after the next rank's."""
        now = time.monotonic()
        if now - self._woke > self._seconds / 2:  # it was stopped itself: what it knows of others is old
            self._heard = self._began = now
        self._woke = now
        self._count += 1
        self._leave_sign(self._count)
        other = (self._rank + 1) % self._ranks
        sign = self._sign_of(other)
        if self._may_be_another_attempt and self._count == 1:
            self._left_over = sign
        sign = None if sign == self._left_over else sign
        self._keeper = self._keeper or self._sign_of(0)
        if sign != self._last:
            self._last, self._heard = sign, now
        silent, limit = now - self._heard, self._seconds * (1 if sign else _FIRST_SIGN)
        if silent > limit and not (sign and sign.count == _LAST):
            self._give_up({other: sign}, f"nothing has come from it for {silent:.0f} s")
        place = self._place
        waited = self._stood(place)
        tells = place.may_take_long and self._rank == 0
        often = self._seconds / _LOOKS if place.waits else self._seconds
        if waited > self._seconds and now - self._looked > often and (place.waits or tells):
            self._looked = now
            self._look_for_those_behind(place, waited)

    def _stood(self, place: Place) -> float:
        """Seconds at a place, without those in which this process was stopped."""
        return time.monotonic() - max(place.since, self._began)

    def _leave_sign(self, count: int) -> None:
        place = self._place
        sign = Sign(
            count,
            place.number,
            place.doing,
            place.may_take_long,
            self._stood(place),
            os.getpid(),
            socket.gethostname(),
        )
        self._store.set(f"{self._prefix}{self._rank}", json.dumps(asdict(sign)))

    def _sign_of(self, rank: int) -> Sign | None:
        key = f"{self._prefix}{rank}"
        return Sign(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _look_for_those_behind(self, place: Place, waited: float) -> None:
        """Names the ranks that have passed the fewest places, and ends the job where they stand still."""
        found = {rank: self._sign_of(rank) for rank in range(self._ranks)}
        signs = {rank: sign for rank, sign in found.items() if sign is not None and sign.count != _LAST}
        fewest = min(sign.place for sign in signs.values())
        behind = {rank: sign for rank, sign in signs.items() if sign.place == fewest}
        if fewest == max(sign.place for sign in signs.values()):
            self._tell(f"no rank has come further than {place.doing} for {waited:.0f} s")
            return
        stood = min(sign.seconds for sign in behind.values())
        # also where it is another that may take long: the rank ahead may wait for that one, as those behind do
        let_be = any(sign.may_take_long for sign in signs.values())
        if place.waits and fewest < place.number and stood > self._seconds and not let_be:
            self._give_up(behind, f"it has been there for {stood:.0f} s")
        self._tell(f"{_stands(behind, 'is')}: for {stood:.0f} s, and the other ranks are further")

    def _tell(self, what: str) -> None:
        """On one rank, now and then."""
        if self._rank == 0 and time.monotonic() - self._told > self._seconds:
            self._told = time.monotonic()
            logger.warning("%s", what)

    def _give_up(self, those: dict[int, Any], why: str) -> None:
        if not self._stopped.is_set():
            self._end(
                UserError(f"{_stands(those, 'hangs')}: {why}, and the other ranks wait for it; {self._cure}")
            )

    def _nobody_there(self, error: Exception, waited: float) -> None:
        if self._rank and not _torchrun_keeps_the_store() and waited > self._seconds:
            self._give_up({0: None}, f"nothing has come from it for {waited:.0f} s")
        elif not self._stopped.is_set():
            logger.warning(
                "no hanging rank will be looked for: the ranks' store cannot be reached (%s)", error
            )

    def _watch_store(self) -> None:
        """A call to a store whose process is stopped, or whose machine is gone, never comes back."""
        woke = time.monotonic()
        while not self._stopped.wait(self._pause):
            now, asked = time.monotonic(), self._asked
            if now - woke > self._seconds / 2 and asked is not None:
                self._asked = now
            elif asked is not None and now - asked > self._seconds:
                why = f"the ranks' store there has not answered for {now - asked:.0f} s"
                if _torchrun_keeps_the_store() and not self._stopped.is_set():
                    where = f"{os.environ['MASTER_ADDR']}, the first machine, hangs"
                    self._end(UserError(f"{where}: {why}, and all ranks need it; {self._cure}"))
                self._give_up({0: self._keeper}, why)
            woke = now


def _stands(those: dict[int, Any], verb: str) -> str:
    """Which ranks are where; a sign of None is a rank that never came."""
    names = []
    for rank, sign in list(those.items())[:_NAMED]:
        who = "" if sign is None else f" (process {sign.process} on {sign.host})"
        names.append(f"rank {rank}{who}")
    more = f" and {len(those) - _NAMED} more" if len(those) > _NAMED else ""
    sign = next(iter(those.values()))
    where = "before its first sign" if sign is None else f"in {sign.doing}"
    return f"{' and '.join(names)}{more} {verb} {where}"


def _torchrun_keeps_the_store() -> bool:
    """Else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


_watches: list[HangWatch] = []  # of this process: one while it does a job
_jobs = 0  # that this process has begun to watch; all ranks do the same ones


@contextlib.contextmanager
def watched(seconds: float | None, *, ranks: int, again: str) -> Iterator[None]:
    """Looks after the ranks of a job for as long as it lasts.

    Args:
        seconds: how long is waited; None looks after nobody.
        ranks: how many there are; one alone is not looked after.
        again: see `HangWatch`.
    """
    global _jobs
    _jobs += 1
    if seconds is None or ranks == 1:
        yield
        return
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    watch = HangWatch(rank, ranks, seconds, lambda: _meet(rank, seconds), again=again, job=_jobs)
    watch.start()
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)
        watch.stop()


def _meet(rank: int, seconds: float) -> Any:
    """A connection to the store in which torch's ranks will meet, or have met: torchrun's, or one in rank 0's process, which is one with torch's."""
    # Lightning finds them out under bare Slurm
    while not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        time.sleep(0.5)
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not _torchrun_keeps_the_store(),
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timedelta(seconds=_FIRST_SIGN * seconds),
    )


def at(doing: str, *, waits: bool = False, may_take_long: bool = False) -> None:
    """See `HangWatch.at`; nothing where nobody is looked after."""
    if _watches:
        _watches[-1].at(doing, waits=waits, may_take_long=may_take_long)
