"""Groups of gloo ranks that do many jobs. One process imports NeMo, which takes 15 s, and all ranks are forked off it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 240  # the first group waits for the import
POLL_SECONDS = 0.02


class RankError(AssertionError):
    """A job failed or did not come back on some rank."""


class Nursery:
    """The process that ranks are forked off; started by the first group, ends with the tests."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def order(self, folder: Path, ranks: list[dict[str, str]]) -> None:
        """Asks for a group of ranks that works in `folder`."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"folder": str(folder), "ranks": ranks}) + "\n")
        self._process.stdin.flush()

    def ended(self) -> str | None:
        """The end of its log where it has ended, None where it lives."""
        assert self._process is not None
        return None if self._process.poll() is None else self._log.read_text(errors="replace")[-4000:]

    def _start(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="asft-nursery-")
        self._log = Path(self._scratch.name) / "log"
        folders = [str(ROOT / "tests" / "nemo_cpu"), str(ROOT / "tests" / "unit" / "checkpoint")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ASFT_DEVICE": "cpu",
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([*folders, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
        }
        command = [sys.executable, str(ROOT / "tests" / "rank_worker.py")]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, text=True, start_new_session=True
            )  # fmt: skip
        atexit.register(self._process.kill)


NURSERY = Nursery()


class RankGroup:
    """`world_size` processes that believe torchrun started them. A job is ``module:function`` with JSON arguments, called on every rank.

    After a failed or timed-out job the processes are in an unknown state: they are ended, and started anew by the next job.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._store: TCPStore | None = None  # there while the ranks are; they meet in it
        self._jobs = 0

    def run(self, call: str, *, timeout: float = 480, **arguments: Any) -> list[Any]:
        """Runs one job on every rank and returns their results, by rank.

        Raises:
            RankError: with the traceback of the first rank that failed, or the ends of the logs after `timeout` seconds.
        """
        if self._store is None or not self._alive():
            self._start()
        number, self._jobs = self._jobs, self._jobs + 1
        partial = self._folder / ".job"
        partial.write_text(json.dumps({"call": call, "arguments": arguments}))
        partial.replace(self._folder / f"job_{number}.json")
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            alive = self._alive()  # before looking: a rank may report and end
            for rank in set(range(self.world_size)) - set(results):
                file = self._folder / f"result_{number}_{rank}.json"
                if file.exists():
                    results[rank] = json.loads(file.read_text())
                    if "error" in results[rank]:
                        self.close()
                        raise RankError(
                            f"rank {rank}, {call}: {results[rank]['error']}\n{results[rank]['traceback']}"
                        )
            if len(results) < self.world_size and (time.monotonic() > deadline or not alive):
                why = f"did not finish in {timeout:.0f} s" if alive else "ended"
                log = (self._folder / "log").read_text(errors="replace")[-4000:]
                self.close()
                raise RankError(
                    f"{call}: the ranks {why}; {len(results)} of {self.world_size} reported\n{log}"
                )
            time.sleep(POLL_SECONDS)
        return [results[rank]["value"] for rank in range(self.world_size)]

    def _alive(self) -> bool:
        return all(Path(f"/proc/{pid}").exists() for pid in self._pids)

    def _start(self) -> None:
        from torch.distributed import TCPStore  # not for every test: it takes seconds

        self.close()
        self._scratch = tempfile.TemporaryDirectory(prefix="asft-ranks-")
        self._folder = Path(self._scratch.name)
        (self._folder / "log").touch()
        self._jobs = 0
        self._pids: list[int] = []
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        NURSERY.order(
            self._folder, [torchruns_environment(r, self.world_size, self._store.port) for r in range(self.world_size)]
        )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not (self._folder / "ranks").exists():
            if (log := NURSERY.ended()) is not None or time.monotonic() > deadline:
                self.close()
                raise RankError(f"no ranks in {START_SECONDS} s\n{log}")
            time.sleep(POLL_SECONDS)
        self._pids = json.loads((self._folder / "ranks").read_text())

    def close(self) -> None:
        """Ends the ranks, at once."""
        if self._store is None:
            return
        (self._folder / "stop").touch()
        deadline = time.monotonic() + 1  # enough for ranks that have nothing to do
        while any(Path(f"/proc/{pid}").exists() for pid in self._pids) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # each leads a session, its helpers are in it
        while any(Path(f"/proc/{pid}").exists() for pid in self._pids):
            time.sleep(POLL_SECONDS)
        self._store = None
        self._scratch.cleanup()


def run_alone(call: str, *, world_size: int = 1, timeout: float = 480, **arguments: Any) -> list[Any]:
    """One job on ranks of its own, for what would leave others changed."""
    group = RankGroup(world_size)
    try:
        return group.run(call, timeout=timeout, **arguments)
    finally:
        group.close()


def torchruns_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What `torchrun --standalone` tells a rank; its agent keeps the store, as the process of the tests does here."""
    return {
        **{f"{scope}RANK": str(rank) for scope in ("", "LOCAL_", "ROLE_")},
        **{f"{scope}WORLD_SIZE": str(world_size) for scope in ("", "LOCAL_", "ROLE_")},
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
