"""When an alarm is sounded, from made-up steps and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from real_runs import alarms_of

from asft_nemo.config.schema import AlarmsConfig
from asft_nemo.nemo.alarms import Alarms, CurveAlarms
from asft_nemo.nemo.stragglers import Place, Probe, slow_probes, slow_ranks

pytestmark = pytest.mark.nemo


def places(*stages_and_replicas: tuple[int, int]) -> list[Place]:
    return [Place(rank, "node", rank, *place) for rank, place in enumerate(stages_and_replicas)]


@pytest.mark.parametrize(
    ("seconds", "where", "found"),
    [
        # stages have other work, and are compared among themselves
        ([1.0, 1.1, 4.0, 4.1], [(0, 0), (0, 1), (1, 0), (1, 1)], []),
        ([1.0, 1.1, 4.0, 9.0], [(0, 0), (0, 1), (1, 0), (1, 1)], [3]),
        # a slow tensor-parallel group of two replicas
        ([1.0, 1.0, 2.0, 2.0], [(0, 0), (0, 0), (0, 1), (0, 1)], [2, 3]),
        # all alike slow: nobody is
        ([9.0, 9.0, 9.0], [(0, 0), (0, 1), (0, 2)], []),
        # one replica: against the ranks' own best, 1 second each
        ([1.0, 1.1, 1.9, 1.9], [(0, 0), (0, 0), (1, 0), (1, 0)], [2, 3]),
        ([3.0, 3.1, 3.0, 3.2], [(0, 0), (0, 0), (1, 0), (1, 0)], []),
    ],
)
def test_who_is_slow(seconds: list[float], where: list[tuple[int, int]], found: list[int]) -> None:
    assert slow_ranks(seconds, [1.0] * len(seconds), places(*where), 1.5) == found


def test_whose_device_is_slow() -> None:
    """Of two ranks, the slower one; of many, those far from the median."""
    assert slow_probes([1.0, 1.6], 1.5) == [1]
    assert slow_probes([1.0, 1.4, 1.2, 5.0, 0.9], 1.5) == [3]
    assert slow_probes([2.0, 2.0, 2.9], 1.5) == []


class MadeUpGpu:
    """Does what it is given in turn, as fast as an H100 at its peak and `slower` times as long; the host takes `launch` seconds to give it something."""

    def __init__(self, *, launch: float = 10e-6, slower: float = 1.0):
        self.launch, self.slower = launch, slower
        self.host = self.device = 0.0

    def take(self, seconds: float) -> float:
        """When it is done with work of so many seconds, which the host gives it now."""
        self.host += self.launch
        self.device = max(self.host, self.device) + seconds
        return self.device

    def product(self, left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
        self.take(2 * left.shape[0] * left.shape[1] * right.shape[1] / 989e12 * self.slower)

    def event(self, *, enable_timing: bool) -> Any:
        gpu = self

        class Event:
            at = 0.0

            def record(self) -> None:
                self.at = gpu.take(0.0)

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                return 1000 * (end.at - self.at)

        return Event()

    def probe(self, monkeypatch: pytest.MonkeyPatch) -> float:
        """Seconds of the probe on it, when it has nothing else to do."""
        with monkeypatch.context() as patch:
            patch.setattr("asft_nemo.cpu.backend.active", lambda: False)
            patch.setattr("torch.cuda.current_device", lambda: "cpu")
            patch.setattr("torch.cuda.Event", self.event)
            patch.setattr("torch.randn", lambda *size, dtype, **_: torch.empty(size, dtype=dtype))
            patch.setattr("torch.mm", self.product)
            probe = Probe()
            probe.run()
            return probe.read()


def test_a_slow_host_is_no_slow_device(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = MadeUpGpu().probe(monkeypatch)
    assert MadeUpGpu(launch=50e-6).probe(monkeypatch) == pytest.approx(usual), "five times as slow"
    assert MadeUpGpu(slower=1.6).probe(monkeypatch) == pytest.approx(1.6 * usual)
    assert MadeUpGpu(launch=50e-6, slower=1.6).probe(monkeypatch) == pytest.approx(1.6 * usual)


def look_at(
    tmp_path: Path, bounds: AlarmsConfig, values: list[dict[str, float | None]]
) -> list[tuple[str, int]]:
    curves = CurveAlarms(bounds, Alarms(tmp_path, lambda: True))
    for step, given in enumerate(values, start=1):
        curves.look({"step": step, "nll": 1.0, "kl": None, "kl_reverse": None, **given})
    return [(alarm["kind"], alarm["step"]) for alarm in alarms_of(tmp_path)]


def test_a_jump_of_the_nll_is_told_once_and_the_next_one_again(tmp_path: Path) -> None:
    steps: list[dict[str, float | None]] = [{"nll": 1.0 + 0.1 * (step % 3)} for step in range(30)]
    for step in (1, 15, 16, 25):  # the first is among too few steps to know what is usual
        steps[step - 1] = {"nll": 3.0}
    steps[19] = {"nll": None}
    assert look_at(tmp_path, AlarmsConfig(), steps) == [("nll", 15), ("nll", 25)]


def test_a_kl_that_stays_above_its_bound_is_told(tmp_path: Path) -> None:
    single: list[dict[str, float | None]] = [{"kl": 5.0 if step == 12 else 0.2} for step in range(20)]
    assert look_at(tmp_path, AlarmsConfig(), single) == []
    rising: list[dict[str, float | None]] = [{"kl_reverse": 0.1 * step} for step in range(30)]
    assert look_at(tmp_path, AlarmsConfig(), rising) == [("kl", 16)]


def test_bounds_that_are_null_are_not_looked_at(tmp_path: Path) -> None:
    steps: list[dict[str, float | None]] = [
        {"nll": float(step % 20 == 0) * 100 + 1, "kl": 9.0} for step in range(60)
    ]
    assert look_at(tmp_path, AlarmsConfig(nll_factor=None, max_kl=None), steps) == []


def test_a_full_disk_does_not_end_the_run(tmp_path: Path) -> None:
    Alarms(tmp_path / "not there", lambda: True).sound("kl", 1, "text")
