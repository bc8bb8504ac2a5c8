"""A rank whose process is stopped before there is a step: the others end and name it, and the command again makes what it makes undisturbed."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from kept import some_of
from models import make_model_with_tokenizer
from ranks import RankError, RankGroup
from real_runs import all_tensors, metrics, settings_of, without_times
from safetensors.torch import load_file

from asft_nemo.config.paths import project_dir

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow, pytest.mark.timeout(900)]

HANG_SECONDS = 10
ENDS_WITHIN = HANG_SECONDS + 40.0  # torchrun gives a stopped rank 30 s before it kills it
LIMIT = 400.0  # for a command that is not disturbed, on a busy machine
STOPPED = r"rank 1 \(process \d+ on {host}\) hangs in {doing}: nothing has come from it for \d+ s, and the other ranks wait for it"

#: job -> its call, where rank 1 stops, what it is doing there
PLACES = {
    "cache": (
        "reference_jobs:cache_itself",
        "asft_nemo.nemo.cache_job:ResidentReference",
        "loading the base",
    ),
    "read": ("jobs:train_itself", "asft_nemo.nemo.extra_state:check_before_load", "reading a checkpoint"),
    "reference": (
        "jobs:train_itself",
        "asft_nemo.reference.frozen:check_before_load",
        "loading the reference",
    ),
    "data": ("jobs:train_itself", "asft_nemo.run_dir:claim_run_dir", "its start"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [json.dumps({"instruction": f"copy {n}:", "response": str(n) * (1 + n % 4)}) for n in range(20)]
    file.write_text("\n".join(lines) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_with_tokenizer(tmp_path_factory.mktemp("model") / "base")


def two_ranks(model: Path, data: str, folder: Path, *, hangs: bool) -> dict[str, Any]:
    """Two steps at TP2, of a run or its cache. Where no rank hangs the default waits, for on a busy machine one may be silent for as long as the tests wait."""
    return {
        **settings_of(model, folder / "run", trainer__max_steps=2, trainer__resume="if_exists"),
        "parallel.pp_size": 1,
        "reference.form": "resident",
        "run.world_size": 2,
        "data.train": [data],
        "data.template": "raw",
        "data.sequence_length": 32,
        **({"alarms.hang_seconds": HANG_SECONDS} if hangs else {}),
    }


def cached(folder: Path) -> dict[str, Any]:
    """What makes it the settings of a cache."""
    return {"reference.form": "cached", "reference.cache_dir": str(folder / "cache")}


def made(folder: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """What a run logged, and the bits of its last checkpoint or of its cache."""
    files = sorted(folder.rglob("rows-*.safetensors"))  # whose last part is another in every cache
    found = {
        f"{file.stem.rpartition('-')[0]} {key}": value
        for file in files
        for key, value in load_file(file).items()
    }
    lines = []
    if not found:
        lines = without_times(metrics(folder / "run"))
        found = all_tensors(folder / "run" / "checkpoints" / "latest")
    return lines, {
        key: value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for key, value in found.items()
    }


@pytest.mark.parametrize("job", some_of(PLACES, kept=["cache"]))
def test_a_stopped_rank_is_named_before_the_first_step(
    ranks2: RankGroup, model: Path, data: str, tmp_path: Path, job: str
) -> None:
    call, where, doing = PLACES[job]

    def arguments(folder: str, *, hangs: bool = False) -> dict[str, Any]:
        settings = two_ranks(model, data, tmp_path / folder, hangs=hangs)
        if job == "cache":
            return {"settings": {**settings, **cached(tmp_path / folder)}, "repair": False}
        return {"settings": settings}

    disturbed = RankGroup(2)
    try:
        with pytest.raises(
            RankError, match=STOPPED.format(host=re.escape(socket.gethostname()), doing=doing)
        ):
            disturbed.run(
                "hang_jobs:stop_at",
                timeout=LIMIT,
                where=where,
                rank=1,
                job=call,
                arguments=arguments("one", hangs=True),
            )
    finally:
        disturbed.close()
    for folder in ("one", "other"):
        ranks2.run(call, timeout=LIMIT, **arguments(folder))
    lines, bits = made(tmp_path / "one")
    assert bits
    assert (lines, bits) == made(tmp_path / "other")


@pytest.mark.long
@pytest.mark.parametrize("command", ["train", "cache-reference"])
def test_a_rank_stopped_from_outside_ends_the_command(
    model: Path, data: str, tmp_path: Path, command: str
) -> None:
    """As typed, with torchrun between: the sentence, exit code 2, nobody left; the same command again makes what it makes undisturbed."""

    def words(folder: str, *, hangs: bool = False) -> list[str]:
        settings = two_ranks(model, data, tmp_path / folder, hangs=hangs)
        if command == "cache-reference":
            settings["reference.form"] = "cached"
        given = {key: value for key, value in settings.items() if key != "run.world_size"}
        typed = [
            f"{key.removesuffix('.name').removesuffix('.form')}={told(value)}" for key, value in given.items()
        ]
        return [sys.executable, "-m", "asft_nemo", command, "recipe=tiny_cpu", *typed]

    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            words("one", hangs=True), stdout=out, stderr=out, cwd=project_dir(), start_new_session=True
        )
    try:
        ranks = started_ranks(process)
        ranks[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert process.wait(timeout=ENDS_WITHIN + 30) == 2, log.read_text()[-3000:]
        took = time.monotonic() - began
        said = log.read_text()
        assert f"rank 1 (process {ranks[1].pid} on {socket.gethostname()}) hangs in " in said, said[-3000:]
        assert "nothing has come from it for " in said
        assert took < ENDS_WITHIN
        assert not any(rank.is_running() for rank in ranks)
    finally:
        for one in [process.pid, *(child.pid for child in family(process.pid))]:
            if psutil.pid_exists(one):
                psutil.Process(one).kill()
        process.wait()
    for folder in ("one", "other"):
        done = subprocess.run(
            words(folder), capture_output=True, text=True, timeout=LIMIT, cwd=project_dir(), check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    lines, bits = made(tmp_path / "one")
    assert bits
    assert (lines, bits) == made(tmp_path / "other")


def told(value: Any) -> str:
    """A setting's value as it is typed."""
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)


def family(pid: int) -> list[psutil.Process]:
    """All below a process."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def started_ranks(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The two ranks, by number, as soon as both talk with the store of torchrun, as their watches are the first to do."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be disturbed"
        found = {}
        for one in family(process.pid):
            try:
                environment = one.environ()
                if "asft_nemo.ranks" in one.cmdline() and one.net_connections("tcp"):
                    found[int(environment["RANK"])] = one
            except (psutil.Error, KeyError):
                continue
        if set(found) == {0, 1}:
            time.sleep(2.0)  # a first sign
            return [found[0], found[1]]
        time.sleep(0.1)
    raise AssertionError("no ranks in time")
