"""Finds ranks that are slower than the others, though every rank's step takes equally long.

All ranks wait for the slowest in every collective, so the seconds of a step say nothing. What is timed is a rank's own work: taking its
micro batches, and the policy's forward passes from after a stage's input has come to before its output goes. Ranks of one
tensor-parallel group, and of one context-parallel group, wait for each other within a layer and are found together. Ranks without a replica
share their work with nobody they do not wait for; every rank therefore also takes a probe, the same small product of matrices whatever its
stage, in which nobody waits.

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
_PROBES = 5  # behind every step; the shortest counts, for a probe may meet a transfer or another process
_GPU_PROBE = (
    4096,
    torch.bfloat16,
)  # 96 MiB, and 0.14 ms at the peak of an H100: several times what launching it takes
_CPU_PROBE = (192, torch.float32)  # 0.1 ms on a server core


@dataclass(frozen=True)
class Measure:
    """What is compared, in an alarm's words.

    Attributes:
        what: continues "works for up to 2 s".
        how: it was taken; `{every}` stands for the number of steps.
        cure: what to do.
    """

    what: str
    how: str
    cure: str


WORK = Measure(
    "of a step",
    "data and forward, median of {every} steps",
    "look at that machine's clocks, temperatures, other processes and file system, or leave it out; trainer.profile=steps:a-b tells ranks of "
    "one tensor-parallel group apart",
)
PROBE = Measure(
    "on a small product of matrices",
    "each rank alone, shortest of {every} steps",
    "look at that device's clocks, temperature, power limit and other processes, or leave its machine out",
)


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


def slow_probes(seconds: Sequence[float], factor: float) -> list[int]:
    """The ranks whose probe takes more than `factor` times the median rank's."""
    usual = statistics.median_low(seconds)
    return [rank for rank, own in enumerate(seconds) if own > factor * usual]


class Stopwatch:
    """Times spans of work on the device, without waiting for it while they run."""

    def __init__(self) -> None:
        self._events: list[tuple[Any, Any]] = []
        self._on_cpu = backend.active()
        self._started = 0.0
        self._spans: list[float] = []

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
            self._spans.append(time.perf_counter() - self._started)
        else:
            self._events[-1][1].record()

    def read(self) -> list[float]:
        """Seconds of each span since the last reading; the device has passed them when a step is over."""
        spans, self._spans = self._spans, []
        for begin, end in self._events:
            end.synchronize()
            spans.append(begin.elapsed_time(end) / 1000)
        self._events.clear()
        return spans


class Probe:
    """A product of two matrices, the same on every rank and without any collective: what a rank's device does when left alone.

    A GPU that has nothing to do waits between an event and a product for the host to launch the product, and a slow host would look like a
    slow device. Therefore an untimed product goes before the timed ones: while it runs, the host queues them, and each runs right behind
    the event before it.
    """

    def __init__(self) -> None:
        size, dtype = _CPU_PROBE if backend.active() else _GPU_PROBE
        device = torch.device(torch.cuda.current_device())
        own = torch.Generator(device).manual_seed(0)  # the run's random numbers stay what they are
        self._left, self._right = (
            torch.randn(size, size, generator=own, dtype=dtype, device=device) for _ in range(2)
        )
        self._product = torch.empty_like(self._left)
        self._watch = Stopwatch()

    @torch.no_grad()
    def run(self) -> None:
        """Takes the probes of one step; on a GPU they are only on their way when this returns."""
        if not backend.active():
            torch.mm(self._left, self._right, out=self._product)
        for _ in range(_PROBES):
            self._watch.start()
            torch.mm(self._left, self._right, out=self._product)
            self._watch.stop()

    def read(self) -> float:
        """Seconds of the shortest since the last reading."""
        return min(self._watch.read())


class StragglerCallback(Callback):
    """Compares the ranks' own work every few steps and sounds an alarm for those that hold up the others.

    Collectives over the world: an all-gather of small objects at the start, and of two fp64 values every `every` steps.

    Args:
        factor: see `slow_ranks`.
        every: steps between comparisons; a rank's time is its median step's among them, its probe the shortest.
        alarms: where alarms go.
        prepass: tells how long taking the step's micro batches took.
    """

    def __init__(self, *, factor: float, every: int, alarms: Alarms, prepass: PrepassCallback):
        self._factor, self._every = factor, every
        self._alarms, self._prepass = alarms, prepass
        self._watch = Stopwatch()
        self._work: deque[float] = deque(maxlen=every)
        self._lowest: list[float] = []
        self._slow: dict[Measure, set[int]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Learns where every rank runs."""
        self.probe = Probe()
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
        """Adds the step and its probes; compares when due."""
        self._work.append(sum(self._watch.read()) + self._prepass.data_seconds)
        self.probe.run()  # between two steps, outside what is logged as their seconds
        if trainer.global_step % self._every == 0 and len(self._work) == self._every:
            self._compare(trainer.global_step)

    def _compare(self, step: int) -> None:
        own = torch.tensor(
            [statistics.median(self._work), self.probe.read()],
            dtype=torch.float64,
            device=torch.cuda.current_device(),
        )
        gathered = [torch.empty_like(own) for _ in self._places]
        torch.distributed.all_gather(gathered, own)
        seconds, probes = torch.stack(gathered).T.tolist()
        self._lowest = [min(pair) for pair in zip(self._lowest or seconds, seconds, strict=True)]
        self._look(step, WORK, slow_ranks(seconds, self._lowest, self._places, self._factor), seconds)
        self._look(step, PROBE, slow_probes(probes, self._factor), probes)

    def _look(self, step: int, measure: Measure, slow: Sequence[int], seconds: Sequence[float]) -> None:
        """Sounds an alarm where a rank is slow that was not at the last comparison."""
        if set(slow) - self._slow.get(measure, set()):
            self._alarms.sound("straggler", step, self._words(measure, slow, seconds))
        self._slow[measure] = set(slow)

    def _words(self, measure: Measure, slow: Sequence[int], seconds: Sequence[float]) -> str:
        shown = ", ".join(
            f"{rank} ({self._places[rank].host}, local rank {self._places[rank].local})"
            for rank in slow[:MOST_LISTED]
        )
        more = f" and {len(slow) - MOST_LISTED} more" if len(slow) > MOST_LISTED else ""
        others = [s for rank, s in enumerate(seconds) if rank not in set(slow)]
        against = f", the other ranks' median is {statistics.median(others):.3g} s" if others else ""
        return (
            f"rank {shown}{more} works for up to {max(seconds[rank] for rank in slow):.3g} s {measure.what}{against} "
            f"({measure.how.format(every=self._every)}; above alarms.straggler_factor={self._factor:g}), and all ranks wait for it: {measure.cure}"
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
