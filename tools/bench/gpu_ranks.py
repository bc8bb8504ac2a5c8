"""Ranks on this machine, each a process of its own, that do one job after another; a job that fails, hangs or takes all memory costs them alone.

A job is ``module:function`` with JSON arguments, called on every rank. With one rank it is a child process whose memory is given back.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ENTRY = Path(__file__).resolve().parent / "gpu_rank.py"
POLL_SECONDS = 0.02
GRACE_SECONDS = 2.0  # for the stacks of ranks that hang, and for ranks that are asked to end
LEAST_SECONDS = 5.0  # of a job, also where no time is left
LOG_CHARACTERS = 6000
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')
_OURS = ("/asft_nemo/", "/bench/", "/tests/")


class RankFailed(RuntimeError):
    """A job failed or did not come back on some rank; the message is one sentence that names it, `log` what the ranks said."""

    def __init__(self, sentence: str, log: str = ""):
        super().__init__(sentence)
        self.log = log


class Ranks:
    """`size` processes that believe torchrun started them.

    After a failed or timed-out job they are in an unknown state: they are ended, and the next job starts new ones.

    Args:
        size: how many.
        device: "cuda", or "cpu", which hides the GPUs.
        paths: folders that jobs are imported from, besides `tools`.
        environment: what the ranks' environment has besides this process's.
        left: tells the seconds that a job may take at most, whatever its own time-out is.
    """

    def __init__(
        self,
        size: int,
        *,
        device: str,
        paths: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
        left: Callable[[], float] = lambda: math.inf,
    ):
        self.world_size, self.device, self._left = size, device, left
        self._paths, self._environment = [str(path) for path in paths], dict(environment or {})
        self._processes: list[subprocess.Popen[bytes]] = []
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(self, call: str, *, timeout: float = 240, **arguments: Any) -> list[Any]:
        """Runs one job on every rank and returns their results, by rank.

        Args:
            call: ``module:function``.
            timeout: seconds, the start of the ranks included where there are none yet.
            arguments: as JSON holds them.

        Raises:
            RankFailed: a rank failed or ended, or some are not done in time.
        """
        timeout = min(timeout, max(self._left(), LEAST_SECONDS))
        if not self._processes or any(process.poll() is not None for process in self._processes):
            self._start()
        number, self._jobs = self._jobs, self._jobs + 1
        job = {"call": call, "arguments": arguments, "timeout": timeout}
        partial = self._folder / ".job"
        partial.write_text(json.dumps(job))
        partial.replace(self._folder / f"job_{number}.json")
        try:
            return self._results(number, call, timeout)
        except BaseException:
            self.close()
            raise

    def _results(self, number: int, call: str, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            ended = {rank: p.returncode for rank, p in enumerate(self._processes) if p.poll() is not None}
            for rank in set(range(self.world_size)) - set(results):
                file = self._folder / f"result_{number}_{rank}.json"
                if file.exists():
                    results[rank] = json.loads(file.read_text())
                    if "error" in results[rank]:
                        log = results[rank]["traceback"] + "\n" + self._log()
                        raise RankFailed(self._at_rank(rank, results[rank]["error"]), log)
            lost = [rank for rank in ended if rank not in results]
            if lost:
                code = ended[lost[0]]
                how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                raise RankFailed(self._at_rank(lost[0], f"it {how} in {call}"), self._log())
            if len(results) < self.world_size:
                if time.monotonic() > deadline:
                    time.sleep(GRACE_SECONDS / 2)
                    raise RankFailed(self._who_hangs(call, timeout, set(results)), self._log())
                time.sleep(POLL_SECONDS)
        return [results[rank]["value"] for rank in range(self.world_size)]

    def _at_rank(self, rank: int, what: str) -> str:
        return what if self.world_size == 1 else f"rank {rank}: {what}"

    def _who_hangs(self, call: str, timeout: float, done: set[int]) -> str:
        """Names the ranks that are behind the others, and where each stands."""
        places = {rank: place_of(self._folder, rank) for rank in range(self.world_size) if rank not in done}
        least = min(count for count, _ in places.values())
        behind = [rank for rank, (count, _) in places.items() if count == least]
        ahead = [rank for rank in places if rank not in behind]
        words = [f"{_ranks(behind)} {_at(places[behind[0]][1])}"]
        if ahead:
            words.append(f"{_ranks(ahead)}, further on, {_at(places[ahead[0]][1])}")
        if done:
            words.append(f"{_ranks(sorted(done))} had finished")
        return f"{call} was not done in {timeout:.0f} s: {'; '.join(words)}"

    def _log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")[-LOG_CHARACTERS:]

    def _start(self) -> None:
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        self.close()
        self._scratch = tempfile.TemporaryDirectory(prefix="asft-gpu-ranks-", ignore_cleanup_errors=True)
        self._folder, self._jobs = Path(self._scratch.name), 0
        self._store: Any = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with (self._folder / "log").open("wb") as log:
            self._processes = [
                subprocess.Popen(
                    [sys.executable, str(ENTRY), str(self._folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment_of(rank),
                    start_new_session=True,
                )
                for rank in range(self.world_size)
            ]

    def _environment_of(self, rank: int) -> dict[str, str]:
        """What `torchrun --standalone` tells a rank; its agent keeps the store, as this process does here."""
        threads = max(1, (os.cpu_count() or 1) // (4 * self.world_size))
        tools = str(ENTRY.parent.parent)
        paths = [tools, str(ENTRY.parent.parent.parent), *self._paths, os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "ASFT_GPU_CHECK_PARENT": str(os.getpid()),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            **({"ASFT_DEVICE": "cpu"} if self.device == "cpu" else {}),
            **{f"{scope}RANK": str(rank) for scope in ("", "LOCAL_", "ROLE_")},
            **{f"{scope}WORLD_SIZE": str(self.world_size) for scope in ("", "LOCAL_", "ROLE_")},
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "ROLE_NAME": "default",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_RUN_ID": "gpu_check",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            **self._environment,
        }

    def close(self) -> None:
        """Ends the ranks."""
        if self._scratch is None:
            return
        (self._folder / "stop").touch()
        deadline = time.monotonic() + GRACE_SECONDS
        while any(process.poll() is None for process in self._processes) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # each leads a session, its helpers are in it
            process.wait()
        self._processes = []
        self._store = None
        self._scratch.cleanup()
        self._scratch = None


def place_of(folder: Path, rank: int) -> tuple[int, str]:
    """How far a rank has come: how many marks it has set, and the last one with the code it runs, in words."""
    count, label = 0, "its start"
    with contextlib.suppress(OSError, ValueError):
        told = json.loads((folder / f"at_{rank}").read_text())
        count, label = told["count"], told["label"]
    code = ""
    with contextlib.suppress(OSError):
        code = code_of((folder / f"stack_{rank}").read_text())
    return count, f"{label}{code}"


def code_of(stacks: str) -> str:
    """What a stack that faulthandler wrote says: the innermost function, and the innermost line that is ours."""
    main = stacks.rpartition("most recent call first)")[2]  # the main thread is written last
    frames = [match.groupdict() for match in _FRAME.finditer(main)]
    if not frames:
        return ", which does not answer"
    ours = next(
        (f for f in frames if any(part in f["file"] for part in _OURS) and Path(f["file"]) != ENTRY),
        frames[0],
    )
    return f" (in {frames[0]['name']}, from {Path(ours['file']).name}:{ours['line']})"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _at(place: str) -> str:
    return f"at {place}"
