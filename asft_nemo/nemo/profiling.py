"""Profiles a few steps of a run: `trainer.profile=steps:a-b`.

Each profiled step gets a torch profiler of its own, from its first micro batch to the end of its update, so a validation or a checkpoint
between two of them is in neither. Nothing of the step changes: ranges are opened where code of ours runs (`asft_nemo.profiling.rooms`), by
the schedule through Megatron's own `config.timers`, and around the optimizer's step; losses and weights are the same bit for bit.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import platform
import resource
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from megatron.core import parallel_state
from torch.profiler import ProfilerActivity

from asft_nemo.config.machine import version_of
from asft_nemo.config.profile_rules import Window, check_window
from asft_nemo.config.schema import RunConfig, data_parallel_size
from asft_nemo.cpu import backend
from asft_nemo.nemo.gpt_model import core_chunks
from asft_nemo.profiling import rooms
from asft_nemo.profiling.breakdown import Breakdown, breakdown, mean
from asft_nemo.profiling.page import (
    RankProfile,
    mean_operators,
    parts_of,
    rank_page,
    rooms_of,
    summary_page,
)
from asft_nemo.profiling.trace import STEP, Operator, operators, timeline
from asft_nemo.run_dir import write_json

logger = logging.getLogger(__name__)

_VERSIONS = {
    "torch": "torch",
    "Megatron-core": "megatron-core",
    "NeMo": "nemo_toolkit",
    "Transformer Engine": "transformer-engine",
}


class StepProfiler:
    """Profiles the steps of a window and writes what it found when the last of them is done.

    Files in `run_dir`/profile: ``rank_R.trace.json.gz``, ``rank_R.md``, ``rank_R.json``, and rank 0's ``summary.md``. Each appears whole
    or not at all. A run that ends within the window leaves none; one that resumes within it profiles the steps it still has. A disk that
    is full, or a trace that cannot be read, ends the profile of that rank, which the summary says, and never the run.

    Args:
        run: the settings.
        window: the steps.
    """

    def __init__(self, run: RunConfig, window: Window):
        self._run, self._window = run, window
        self._dir = Path(run.run.dir) / "profile"
        self._step: _ProfiledStep | None = None
        self._done: list[tuple[int, Breakdown, list[Operator]]] = []
        self._speeds: list[Mapping[str, float]] = []
        self._trace: dict[str, Any] = {}
        self._problem: str | None = None  # why this rank will write nothing

    def say_if_past(self, done: int) -> None:
        """Warns where a run goes on, after `done` steps, behind the window: it will leave no profile."""
        if self._window.last <= done:
            logger.warning(
                "trainer.profile=%s profiles nothing: the run goes on after step %d; name later steps, of %d or more",
                self._run.trainer.profile,
                done,
                done + 1,
            )

    def begin(self, trainer: Any, step: int) -> None:
        """Starts a step's profile where it is in the window, just before its clock.

        Collective: a barrier, so that ranks whose profiler takes longer to start do not show up as waiting in the others' step.

        Args:
            trainer: Lightning's.
            step: its number from 1.
        """
        if self._window.first <= step <= self._window.last:
            self._step = _ProfiledStep(trainer, step)
            torch.distributed.barrier()
            self._step.begin()

    def end(self, speed: Mapping[str, float]) -> None:
        """Ends the profile of the step that was begun, just after its clock; writes the files after the last one.

        Collective after the last one: two all-gathers of each rank's result.

        Args:
            speed: what metrics.jsonl says of the step's operations; empty where this rank does not write it.
        """
        if self._step is None:
            return
        profiled, self._step = self._step, None
        profiled.end()
        with self._unless_spoilt(f"the trace of step {profiled.number}"):
            self._keep(profiled, speed)
        if profiled.number == self._window.last:
            profile = self._profile()
            with self._unless_spoilt("its pages"):
                self._write(profile)
            self._trace, self._done = {}, []
            self._summarize(profile)

    @contextmanager
    def _unless_spoilt(self, what: str) -> Iterator[None]:
        """Remembers what goes wrong with a file within, for other ranks wait for this one in the next step and in the summary."""
        try:
            yield
        except (OSError, ValueError) as error:  # the disk is full; the trace was cut short, or has no step
            self._problem = self._problem or f"{what}: {error}"

    def _keep(self, profiled: _ProfiledStep, speed: Mapping[str, float]) -> None:
        """Reads a step's trace; nothing where an earlier one was spoilt."""
        if self._problem is not None:
            return
        trace = profiled.trace(self._dir)
        events = trace.pop("traceEvents")
        self._done.append((profiled.number, breakdown(timeline(events)), operators(events)))
        self._trace = {**trace, "traceEvents": [*self._trace.get("traceEvents", []), *events]}
        self._speeds.append(speed)

    def _write(self, profile: RankProfile) -> None:
        """This rank's files; none where a trace was spoilt."""
        if self._problem is not None:
            return
        _write_atomically(
            self._dir / f"rank_{profile.rank}.trace.json.gz",
            gzip.compress(json.dumps(self._trace).encode(), compresslevel=1),
        )
        _write_atomically(self._dir / f"rank_{profile.rank}.md", rank_page(profile).encode())
        write_json(self._dir / f"rank_{profile.rank}.json", profile.to_dict())

    def _summarize(self, profile: RankProfile) -> None:
        """Rank 0's page of all ranks. Collective: two all-gathers."""
        found: list[tuple[RankProfile, str | None]] = [
            (profile, self._problem)
        ] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, (profile, self._problem))
        if profile.rank != 0:
            return
        written = [one for one, why in found if why is None]
        failed = {one.rank: why for one, why in found if why is not None}
        for rank, why in failed.items():
            logger.warning("rank %d could not write its profile: %s", rank, why)
        try:
            self._dir.mkdir(parents=True, exist_ok=True)  # which rank 0 may not have come to
            _write_atomically(self._dir / "summary.md", summary_page(written, failed).encode())
        except OSError as error:
            logger.warning("the profile's summary could not be written: %s", error)
        else:
            logger.info("profile of steps %d to %d: %s", *self._window, self._dir / "summary.md")

    def _profile(self) -> RankProfile:
        whole = mean([one for _, one, _ in self._done])
        speeds = [speed for speed in self._speeds if speed]
        return RankProfile(
            rank=torch.distributed.get_rank(),
            place=_place(),
            steps=[step for step, _, _ in self._done],
            step_seconds=[one.seconds for _, one, _ in self._done],
            parts=parts_of(whole),
            communication=whole.communication,
            traffic={kind: vars(traffic) for kind, traffic in whole.traffic.items()},
            rooms=rooms_of(whole),
            operators=[vars(one) for one in mean_operators([found for _, _, found in self._done])],
            peak_bytes={
                "device": torch.cuda.max_memory_allocated(),
                "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            },
            run=describe(self._run),
            speed={
                name: sum(one[name] for one in speeds) / len(speeds) for name in (speeds[0] if speeds else ())
            },
        )


def profiler_of(run: RunConfig, max_steps: int) -> StepProfiler | None:
    """The run's profiler, None where it asks for none.

    Raises:
        ConfigError: the run of `max_steps` steps ends before the steps to profile.
    """
    asked = run.trainer.profile
    return None if asked is None else StepProfiler(run, check_window(asked, max_steps))


class _ProfiledStep:
    """One step under torch's profiler."""

    def __init__(self, trainer: Any, number: int):
        self.number = number
        self._ranges = ranges(trainer)
        activities = [ProfilerActivity.CPU]
        if not backend.active():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def begin(self) -> None:
        """Opens the step's range."""
        self._ranges.__enter__()
        self._whole: AbstractContextManager[None] = rooms.span(STEP)
        self._whole.__enter__()

    def end(self) -> None:
        """Closes the step's range, after waiting for the device, so that the step has all its kernels."""
        torch.cuda.synchronize()
        self._whole.__exit__(None, None, None)
        self._ranges.__exit__(None, None, None)
        self._profiler.stop()

    def trace(self, folder: Path) -> dict[str, Any]:
        """The ended step's trace, by way of a file in `folder`.

        Raises:
            OSError: it could not be written.
            ValueError: it was cut short: torch says nothing of a disk that is full.
        """
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".rank_{torch.distributed.get_rank()}.json"
        try:
            self._profiler.export_chrome_trace(str(partial))
            return json.loads(partial.read_text())
        finally:
            partial.unlink(missing_ok=True)


class RangesCallback(Callback):
    """Opens the house's ranges for the whole run where Nsight Systems watches it; otherwise nothing."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Opens them."""
        self._watched = rooms.under_nsys()
        if self._watched:
            self._ranges = ranges(trainer)
            self._ranges.__enter__()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Puts everything back."""
        if self._watched:
            self._ranges.__exit__(None, None, None)


@contextmanager
def ranges(trainer: Any) -> Iterator[None]:
    """Opens the house's ranges in the steps meanwhile: in our code, in Megatron's schedules, around the loss and around the optimizer.

    Args:
        trainer: Lightning's, set up: the model and the optimizers exist.
    """
    chunks = core_chunks(trainer.strategy.megatron_parallel)
    configs = {id(chunk.config): chunk.config for chunk in chunks}.values()
    before = [config.timers for config in configs]
    for config in configs:
        config.timers = rooms.Spans()
    hooks = [hook for chunk in chunks if chunk.post_process for hook in _range_around(chunk.output_layer)]
    steps = [_range_of_step(optimizer.mcore_optimizer) for optimizer in trainer.strategy.optimizers]
    watched = rooms.watch(rooms.Watch.NVTX if not backend.active() else rooms.Watch.PROFILER)
    try:
        yield
    finally:
        rooms.watch(watched)
        for config, timers in zip(configs, before, strict=True):
            config.timers = timers
        for hook in hooks:
            hook.remove()
        for optimizer, step in steps:
            optimizer.step = step


def _range_around(head: torch.nn.Module) -> tuple[Any, Any]:
    """Hooks that open and close the loss's room: it is computed in the output layer's forward."""
    opened: list[AbstractContextManager[Any]] = []

    def enter(*_: Any) -> None:
        opened.append(rooms.room("loss"))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    return head.register_forward_pre_hook(enter), head.register_forward_hook(leave)


def _range_of_step(optimizer: Any) -> tuple[Any, Any]:
    """Makes Megatron's optimizer step open its room; returns the optimizer and the step it had."""
    take = optimizer.step

    def step() -> Any:
        with rooms.room("optimizer"):
            return take()

    optimizer.step = step
    return optimizer, take


def describe(run: RunConfig) -> dict[str, str]:
    """What ran, in the words of the settings."""
    layout, trainer = run.parallel, run.trainer
    sizes = {"TP": layout.tp_size, "PP": layout.pp_size, "VPP": layout.vpp_size, "CP": layout.cp_size}
    shown = [f"{name}{size}" for name, size in sizes.items() if size not in (None, 1)]
    shown.append(f"DP{data_parallel_size(run)}")
    if layout.sequence_parallel:
        shown.append("sequence parallel")
    versions = {name: version_of(distribution) for name, distribution in _VERSIONS.items()}
    return {
        "device": platform.machine() if backend.active() else torch.cuda.get_device_name(),
        "layout": " x ".join(shown[:-1] if layout.sequence_parallel else shown)
        + (", sequence parallel" if layout.sequence_parallel else ""),
        "run": (
            f"{run.recipe}, objective={run.objective.name}, reference={run.reference.form}, peft={run.peft.name}, "
            f"precision={run.precision}, recompute.granularity={run.recompute.granularity}"
        ),
        "batch": (
            f"{trainer.global_batch_size} examples a step, {trainer.micro_batch_size} a micro batch, "
            f"data.sequence_length={run.data.sequence_length}, data.packing={str(run.data.packing).lower()}"
        ),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    }


def _place() -> str:
    ranks = {
        "TP": parallel_state.get_tensor_model_parallel_rank(),
        "PP": parallel_state.get_pipeline_model_parallel_rank(),
        "CP": parallel_state.get_context_parallel_rank(),
        "DP": parallel_state.get_data_parallel_rank(),
    }
    return ", ".join(f"{name} {rank}" for name, rank in ranks.items())


def _write_atomically(file: Path, content: bytes) -> None:
    partial = file.with_name(f".{file.name}.new")
    try:
        partial.write_bytes(content)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
