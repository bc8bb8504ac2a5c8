"""Finds ranks that are slower than the others, though every rank's step takes equally long.

All ranks wait for the slowest in every collective, so the seconds of a step say nothing. What is timed is a rank's own work: taking its
micro batches, and the policy's forward passes from after a stage's input has come to before its output goes. Ranks of one
tensor-parallel group, and of one context-parallel group, wait for each other within a layer and are found together.

Megatron's StragglerDetector times the same span, needs CUDA, reports throughput and names no bound; the span is timed here by CUDA events on
GPUs and by the clock on CPU ranks, and read behind the step, when the device has passed them anyway.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import Callback
from megatron.core import parallel_state

from asft_nemo.config.schema import AlarmsConfig
from asft_nemo.cpu import backend
from asft_nemo.nemo.alarms import Alarms
from asft_nemo.nemo.schedule import PrepassCallback

MOST_LISTED = 16  # ranks in one sentence


@dataclass(frozen=True)
class Place:
    """Where a rank runs and whose work it shares.

    Attributes:
        rank: global.
        host: its machine.
        local: its number there, which is its GPU's.
        stage: its pipeline rank.
        replica: its data-parallel rank.
    """

    rank: int
    host: str
    local: int
    stage: int
    replica: int


def slow_ranks(
    seconds: Sequence[float], lowest: Sequence[float], places: Sequence[Place], factor: float
) -> list[int]:
    """The ranks that work more than `factor` times as long as they should.

    Where there are several data-parallel replicas, a rank is held against the median of its pipeline stage, whose ranks have the same
    work. Where there is one, ranks of other stages have other work: each is held against the shortest it ever took itself, and that
    against the other ranks' (a run that slows down everywhere, as with longer rows, has no slow rank).

    Args:
        seconds: of each rank's work.
        lowest: the least that each rank took in any comparison of this run, this one included.
        places: of the ranks.
        factor: above 1.
    """
    if len({place.replica for place in places}) > 1:
        usual = [
            statistics.median_low(
                [s for s, other in zip(seconds, places, strict=True) if other.stage == place.stage]
            )
            for place in places
        ]
    else:
        growth = statistics.median_low([s / max(low, 1e-9) for s, low in zip(seconds, lowest, strict=True)])
        usual = [low * growth for low in lowest]
    return [rank for rank, (s, u) in enumerate(zip(seconds, usual, strict=True)) if s > factor * u]


class Stopwatch:
    """Adds up spans of work on the device, without waiting for it while they run."""

    def __init__(self) -> None:
        self._events: list[tuple[Any, Any]] = []
        self._on_cpu = backend.active()
        self._started, self._seconds = 0.0, 0.0

    def start(self) -> None:
        """A span begins."""
        if self._on_cpu:
            self._started = time.perf_counter()
            return
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        pair[0].record()
        self._events.append(pair)

    def stop(self) -> None:
        """It ends."""
        if self._on_cpu:
            self._seconds += time.perf_counter() - self._started
        else:
            self._events[-1][1].record()

    def read(self) -> float:
        """Seconds of all spans since the last reading; the device has passed them when a step is over."""
        seconds = self._seconds
        for begin, end in self._events:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1000
        self._events.clear()
        self._seconds = 0.0
        return seconds


class StragglerCallback(Callback):
    """Compares the ranks' own work every few steps and sounds an alarm for those that hold up the others.

    Collectives over the world: an all-gather of small objects at the start, and of one fp64 value every `every` steps.

    Args:
        factor: see `slow_ranks`.
        every: steps between comparisons; a rank's time is its median step's among them.
        alarms: where alarms go.
        prepass: tells how long taking the step's micro batches took.
    """

    def __init__(self, *, factor: float, every: int, alarms: Alarms, prepass: PrepassCallback):
        self._factor, self._every = factor, every
        self._alarms, self._prepass = alarms, prepass
        self._watch = Stopwatch()
        self._work: deque[float] = deque(maxlen=every)
        self._lowest: list[float] = []
        self._slow: set[int] = set()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Learns where every rank runs."""
        own = Place(
            rank=torch.distributed.get_rank(),
            host=socket.gethostname(),
            local=int(os.environ.get("LOCAL_RANK", "0")),
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            replica=parallel_state.get_data_parallel_rank(),
        )
        places: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(places, asdict(own))
        self._places = [Place(**place) for place in places]

    def on_megatron_microbatch_start(self, step: Any, batch: Any) -> None:
        """A stage's input is here."""
        if not step.forward_only:
            self._watch.start()

    def on_megatron_microbatch_end(self, step: Any, batch: Any, output: Any) -> None:
        """Its output has not left yet."""
        if not step.forward_only:
            self._watch.stop()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        """Adds the step; compares when due."""
        self._work.append(self._watch.read() + self._prepass.data_seconds)
        if trainer.global_step % self._every == 0 and len(self._work) == self._every:
            self._compare(trainer.global_step)

    def _compare(self, step: int) -> None:
        own = torch.tensor(
            [statistics.median(self._work)], dtype=torch.float64, device=torch.cuda.current_device()
        )
        gathered = [torch.empty_like(own) for _ in self._places]
        torch.distributed.all_gather(gathered, own)
        seconds = torch.cat(gathered).tolist()
        self._lowest = [min(pair) for pair in zip(self._lowest or seconds, seconds, strict=True)]
        slow = slow_ranks(seconds, self._lowest, self._places, self._factor)
        if set(slow) - self._slow:
            self._alarms.sound("straggler", step, self._words(slow, seconds))
        self._slow = set(slow)

    def _words(self, slow: Sequence[int], seconds: Sequence[float]) -> str:
        shown = ", ".join(
            f"{rank} ({self._places[rank].host}, local rank {self._places[rank].local})"
            for rank in slow[:MOST_LISTED]
        )
        more = f" and {len(slow) - MOST_LISTED} more" if len(slow) > MOST_LISTED else ""
        others = [s for rank, s in enumerate(seconds) if rank not in set(slow)]
        against = f", the other ranks' median is {statistics.median(others):.3g} s" if others else ""
        return (
            f"rank {shown}{more} works for up to {max(seconds[rank] for rank in slow):.3g} s of a step{against} (data and forward, median of "
            f"{self._every} steps; above alarms.straggler_factor={self._factor:g}), and all ranks wait for it: look at that machine's clocks, "
            "temperatures, other processes and file system, or leave it out; trainer.profile=steps:a-b tells ranks of one "
            "tensor-parallel group apart"
        )


def straggler_callbacks(bounds: AlarmsConfig, alarms: Alarms, prepass: PrepassCallback) -> list[Callback]:
    """The callback where stragglers are looked for, else nothing."""
    if bounds.straggler_factor is None:
        return []
    return [
        StragglerCallback(
            factor=bounds.straggler_factor, every=bounds.straggler_every, alarms=alarms, prepass=prepass
        )
    ]
