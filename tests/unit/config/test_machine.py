"""What is said to the device before it is first used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from asft_nemo import train
from asft_nemo.config.load import compose
from asft_nemo.cpu import backend

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


class LookedAtTheDevice(Exception):
    pass


@pytest.mark.parametrize(
    ("layout", "said"),
    [("parallel.tp_size", "1"), ("parallel.cp_size", "1"), ("parallel.pp_size", None)],
)
@pytest.mark.parametrize("given", [None, "32"])
@pytest.mark.parametrize("job", ["train", "cache"])
def test_one_queue_is_asked_for_before_the_device_is_looked_at(
    layout: str,
    said: str | None,
    given: str | None,
    job: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Whether there is a device is the first thing that ranks ask; the environment's own word stays."""
    asked: list[str | None] = []

    def install() -> None:
        asked.append(os.environ.get(QUEUES))
        raise LookedAtTheDevice

    monkeypatch.setattr(backend, "install", install)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(QUEUES, given or "")
    if given is None:
        monkeypatch.delenv(QUEUES)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "copy 1:", "response": "1"}\n')
    words = ["recipe=tiny_cpu", "objective=asft", f"data.train=[{rows}]", "run.world_size=2", f"{layout}=2"]
    run = compose([*words, "reference=cached", "reference.cache_dir=cache", "alarms.hang_seconds=null"])
    with pytest.raises(LookedAtTheDevice):
        train.train(run) if job == "train" else train.cache_reference(run, repair=False)
    assert asked == [given or said]
