"""Ends a run in which a rank hangs, and says which: all others wait for it in a collective, and would until the process group's own time-out.

Every rank has a thread that leaves a sign in the ranks' store (torch's, which the collectives met in; no collective, no GPU) with how far training
has come, and looks after the sign of the rank behind it. Two things end the run:

* a rank whose thread gives no sign: its process is stopped, its machine is gone or out of memory, its interpreter is stuck;
* a rank that gives signs and stays behind in a step in which others wait for it: it hangs in a read, or waits for something that never comes.

Where all ranks stand at the same place nobody is named: that is a slow step, or a network that lost a message, and the process group's time-out is for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback

from asft_nemo.errors import UserError
from asft_nemo.leaving import give_up

logger = logging.getLogger(__name__)

_PREFIX = "asft_sign_"
_MOST_PAUSE = 5.0  # seconds between two signs
_LAST = -1  # the count of a rank that has done its work
_CURE = (
    "look after that process and its machine (is it stopped, out of memory, waiting for a disk), and start the run again with trainer.resume=must; "
    "alarms.hang_seconds says how long is waited"
)


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself.

    Attributes:
        count: of its signs.
        place: how many places of training it has passed.
        doing: what it does there.
        waits: whether the other ranks of a step wait for it there.
        process, host: who it is.
    """

    count: int
    place: int
    doing: str
    waits: bool
    process: int
    host: str


class HangWatch:
    """The thread of one rank.

    Args:
        rank, ranks: this one's number, and how many there are.
        seconds: how long is waited.
        store: the ranks'; of this thread alone, for a call may wait.
        end: called with the sentence; never returns.
    """

    def __init__(
        self, rank: int, ranks: int, seconds: float, store: Any, end: Callable[[Exception], NoReturn]
    ):
        self._rank, self._ranks, self._seconds, self._store, self._end = rank, ranks, seconds, store, end
        self._place, self._doing, self._waits = 0, "its start", False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="hang watch")

    def start(self) -> None:
        """Begins to leave signs."""
        self._store.set_timeout(timedelta(seconds=self._seconds))
        self._thread.start()

    def stop(self) -> None:
        """Leaves no more, and looks after nobody; returns at once."""
        self._stopped.set()

    def at(self, doing: str, *, waits: bool) -> None:
        """Says that this rank has come to the next place. All ranks pass the same places in the same order."""
        self._doing, self._waits = doing, waits
        self._place += 1

    def _watch(self) -> None:
        pause = min(_MOST_PAUSE, self._seconds / 5)
        other = (self._rank + 1) % self._ranks
        count, last, changed, place, moved = 0, None, time.monotonic(), -1, time.monotonic()
        while not self._stopped.wait(pause):
            count += 1
            try:
                self._leave_sign(count)
                sign = self._sign_of(other)
                now = time.monotonic()
                if sign != last:
                    last, changed = sign, now
                if self._place != place:
                    place, moved = self._place, now
                gone = sign is not None and sign.count == _LAST
                if not gone and now - changed > self._seconds:
                    self._give_up(other, last, now - changed)
                if self._waits and now - moved > self._seconds:
                    self._look_for_one_behind(place, now - moved)
                    moved = now
            except torch.distributed.DistError as error:
                self._store_is_gone(error)
                return
        with contextlib.suppress(torch.distributed.DistError):
            self._leave_sign(_LAST)

    def _leave_sign(self, count: int) -> None:
        sign = Sign(count, self._place, self._doing, self._waits, os.getpid(), socket.gethostname())
        self._store.set(f"{_PREFIX}{self._rank}", json.dumps(asdict(sign)))

    def _sign_of(self, rank: int) -> Sign | None:
        key = f"{_PREFIX}{rank}"
        return Sign(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _look_for_one_behind(self, place: int, waited: float) -> None:
        """Names the rank that has passed the fewest places, where it is behind this one."""
        signs = {rank: self._sign_of(rank) for rank in range(self._ranks) if rank != self._rank}
        rank, sign = min(signs.items(), key=lambda found: -1 if found[1] is None else found[1].place)
        if sign is None or sign.place < place:
            self._give_up(rank, sign, waited)
        logger.warning("no rank has come further than %s for %.0f s", self._doing, waited)

    def _give_up(self, rank: int, sign: Sign | None, waited: float) -> None:
        if self._stopped.is_set():
            return
        who = f"rank {rank}"
        if sign is not None:
            who += f" (process {sign.process} on {sign.host})"
        where = "before training" if sign is None else f"in {sign.doing}"
        self._end(
            UserError(
                f"{who} hangs {where}: nothing has come from it for {waited:.0f} s, and the other ranks wait for it; {_CURE}"
            )
        )

    def _store_is_gone(self, error: Exception) -> None:
        """It lives with torchrun, whose end ends the ranks, or with rank 0."""
        if self._stopped.is_set():
            return
        if "timeout" in str(error).lower() and "TORCHELASTIC_RUN_ID" not in os.environ and self._rank != 0:
            self._give_up(0, None, self._seconds)
        logger.warning(
            "no hanging rank will be looked for any more: the ranks' store does not answer (%s)", error
        )


_watches: list[HangWatch] = []  # of this process: one while it trains


class HangCallback(Callback):
    """Watches over the ranks of a training run from its first step to its last.

    Comes before all other callbacks, so that what they do behind a step (validation, checkpoints) is not taken for a part of it.

    Args:
        seconds: how long is waited.
        end: see `HangWatch`.
    """

    def __init__(self, seconds: float, end: Callable[[Exception], NoReturn] = give_up):
        self._seconds, self._end = seconds, end

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the thread, where there are ranks to wait for."""
        if trainer.world_size > 1:
            # torch has no public name for it, nor a type that says what its stores can
            store: Any = torch.distributed.distributed_c10d._get_default_store()
            watch = HangWatch(
                trainer.global_rank, trainer.world_size, self._seconds, store.clone(), self._end
            )
            watch.start()
            _watches.append(watch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step begins: this rank takes its micro batches."""
        _at(f"step {trainer.global_step + 1}, taking its micro batches", waits=True)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """What follows may take as long as it takes."""
        _at(f"what follows step {trainer.global_step}", waits=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Training has ended."""
        self.stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """It fails for another reason."""
        self.stop()

    def stop(self) -> None:
        """Ends the thread."""
        while _watches:
            _watches.pop().stop()


def _at(doing: str, *, waits: bool) -> None:
    if _watches:
        _watches[-1].at(doing, waits=waits)


def has_its_micro_batches() -> None:
    """Told by the step: from here on this rank waits for others, and they for it."""
    _at("its passes over the micro batches", waits=True)


def hang_callbacks(seconds: float | None) -> list[Callback]:
    """The callback, or nothing where nobody is to be looked after."""
    return [] if seconds is None else [HangCallback(seconds)]
