"""Groups of gloo ranks that are started once and do many jobs: importing NeMo takes 10 s a rank, so tests share them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 120  # the first job imports NeMo on every rank
POLL_SECONDS = 0.05


class RankError(AssertionError):
    """A job failed or did not come back on some rank."""


class RankGroup:
    """`world_size` processes under torchrun. A job is ``module:function`` with JSON arguments, called on every rank.

    After a failed or timed-out job the processes are in an unknown state: they are ended, and started anew by the next job.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._process: subprocess.Popen[bytes] | None = None
        self._jobs = 0

    def run(self, call: str, *, timeout: float = 90, **arguments: Any) -> list[Any]:
        """Runs one job on every rank and returns their results, by rank.

        Raises:
            RankError: with the traceback of the first rank that failed, or the ends of the logs after `timeout` seconds.
        """
        fresh = self._process is None or self._process.poll() is not None
        if fresh:
            self._start()
        number, self._jobs = self._jobs, self._jobs + 1
        partial = self._folder / ".job"
        partial.write_text(json.dumps({"call": call, "arguments": arguments}))
        partial.replace(self._folder / f"job_{number}.json")
        deadline = time.monotonic() + timeout + (START_SECONDS if fresh else 0)
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            for rank in set(range(self.world_size)) - set(results):
                file = self._folder / f"result_{number}_{rank}.json"
                if file.exists():
                    results[rank] = json.loads(file.read_text())
                    if "error" in results[rank]:
                        self.close()
                        raise RankError(
                            f"rank {rank}, {call}: {results[rank]['error']}\n{results[rank]['traceback']}"
                        )
            assert self._process is not None
            if time.monotonic() > deadline or self._process.poll() is not None:
                why = "ended" if self._process.poll() is not None else f"did not finish in {timeout:.0f} s"
                log = self._log.read_text(errors="replace")[-4000:]
                self.close()
                raise RankError(
                    f"{call}: the ranks {why}; {len(results)} of {self.world_size} reported\n{log}"
                )
            time.sleep(POLL_SECONDS)
        return [results[rank]["value"] for rank in range(self.world_size)]

    def _start(self) -> None:
        self.close()
        self._scratch = tempfile.TemporaryDirectory(prefix="asft-ranks-")
        self._folder = Path(self._scratch.name)
        self._log = self._folder / "log"
        self._jobs = 0
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ASFT_DEVICE": "cpu",
            "ASFT_TESTER_PID": str(os.getpid()),
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT / "tests" / "nemo_cpu"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
            ),
        }
        command = [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={self.world_size}",
            ),
            *(str(ROOT / "tests" / "rank_worker.py"), str(self._folder)),
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def close(self) -> None:
        """Ends the ranks, at once."""
        if self._process is None:
            return
        (self._folder / "stop").touch()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None
        self._scratch.cleanup()
