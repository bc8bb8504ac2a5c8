"""One training run on two ranks that is disturbed again and again, each time in another way, and goes on each time.

In the end its metrics and weights must be those of the run that nobody disturbed, bit for bit. After every disturbance, what the run had said was saved
must be there. Each start costs the import of NeMo, so disturbances follow each other in one run instead of having one each.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.cached import rows_of
from faults.places import ROOMY, Disk
from faults.processes import NotReached, chosen, end_all, end_with, family, send, wait_for_end
from faults.rows import REFUSED, RESUMED, VIOLATION, Row
from faults.shell import LIMIT, Said, run
from faults.yard import PROJECT, RANKS_LIMIT, STEPS, Yard, digests, release

HANG_SECONDS = (
    10  # of starts in which a rank is stopped; in others a busy machine may well be silent for so long
)
ENDS_WITHIN = (
    HANG_SECONDS + 90.0
)  # torchrun gives a stopped rank 30 s before it kills it, and the machine may be busy
_OF_TIME = ("seconds", "tokens_per_second", "tflops", "mfu", "memory")
# How much was read from the cache, and not computed, depends on when the run was disturbed.
_NOT_COMPARED = (*_OF_TIME, "cache_hit_rate")

EXPECTED = "what was saved is whole; resumed, the metrics and weights of an undisturbed run, bit for bit"
HANGING = f"all ranks end within {ENDS_WITHIN:.0f} s (alarms.hang_seconds={HANG_SECONDS}) with a sentence that names the rank; resumed, the same bits"


@dataclass(frozen=True)
class Disturbance:
    """What happens to a start of the run.

    Attributes:
        moment: a key of `MOMENTS`.
        whom: ``launcher``, ``torchrun``, ``rank 0``, ``rank 1`` or ``all``.
        how: a signal's name, ``twice`` (a second start of the same run) or ``full`` (the disk, of a run that has nothing yet).
    """

    moment: str
    whom: str
    how: str

    def name(self, number: int, place: int) -> str:
        """Of the row."""
        return f"chain{number}:{self.moment}:{self.whom}:{self.how}:{place}".replace(" ", "")


SMALL_DISK = 60_000_000  # a base and a checkpoint fit, a second one does not
LONG: tuple[tuple[Disturbance, ...], ...] = (
    (
        Disturbance("training", "rank 1", "SIGKILL"),
        Disturbance("checkpoint", "rank 0", "SIGKILL"),
        Disturbance("training", "rank 1", "SIGSTOP"),
    ),
    (
        Disturbance("start", "all", "SIGKILL"),
        Disturbance("cache", "rank 0", "SIGKILL"),
        Disturbance("checkpoint", "launcher", "SIGKILL"),
        Disturbance("training", "launcher", "twice"),
    ),
    (
        Disturbance("training", "torchrun", "SIGKILL"),
        Disturbance("checkpoint", "rank 1", "SIGTERM"),
        Disturbance("training", "rank 0", "SIGSTOP"),
    ),
    (
        Disturbance("start", "launcher", "SIGTERM"),
        Disturbance("cache", "all", "SIGTERM"),
        Disturbance("checkpoint", "all", "SIGKILL"),
        Disturbance("training", "rank 0", "SIGTERM"),
    ),
    (
        Disturbance("start", "launcher", "full"),
        Disturbance("training", "all", "SIGTERM"),
        Disturbance("checkpoint", "torchrun", "SIGTERM"),
    ),
)
SHORT: tuple[Disturbance, ...] = (
    Disturbance("cache", "rank 0", "SIGKILL"),
    Disturbance("checkpoint", "rank 1", "SIGKILL"),
    Disturbance("training", "rank 1", "SIGSTOP"),
    Disturbance("training", "launcher", "twice"),
)


class Chain:
    """The disturbed run.

    Args:
        yard: has the undisturbed one.
        seed: of the moments.
        number: tells chains of a campaign apart.
    """

    artefact, command = "training run", "asft train"

    def __init__(self, yard: Yard, *, seed: int, number: int):
        self._yard, self._number = yard, number
        self._name = f"chain{number}"
        self._chance = random.Random(f"{seed} {self._name}")
        self._dir, self._cache = yard.here / self._name, yard.here / f"{self._name}_cache"
        self._undisturbed = _lines(yard.here / "run" / "metrics.jsonl")
        self._starts = 0

    def disturb(self, disturbances: tuple[Disturbance, ...]) -> Iterator[Row]:
        """A row a disturbance, and one for the end."""
        for place, disturbance in enumerate(disturbances):
            yield self._row(disturbance.name(self._number, place), disturbance)
        yield self._last_row()
        release(self._dir)
        release(self._cache)

    def _row(self, name: str, disturbance: Disturbance) -> Row:
        started = time.monotonic()
        disk = self._disk() if disturbance.how == "full" else None
        process = self._start(hangs=disturbance.how == "SIGSTOP")
        where, sentence, problem = "", "", ""
        try:
            where = self._await(MOMENTS[disturbance.moment], process)
            act: Callable[[Disturbance, subprocess.Popen[bytes]], tuple[str, str]] = {
                "twice": self._twice,
                "SIGSTOP": self._stop,
                "full": self._await_full,
            }.get(disturbance.how, self._kill)
            if disk is not None:
                where = self._fill(disk)
            sentence, problem = act(disturbance, process)
        except _HadEnded:
            problem = "it had ended before it could be disturbed"  # nothing was tried: that must not pass for a fault
        except NotReached as error:
            problem = str(error)
        finally:
            end_all(process)
        if disk is not None:
            disk.become(f"size={ROOMY}")
        problem = problem or self.saved_is_whole()
        refused = disturbance.how in ("twice", "SIGSTOP", "full")
        return Row(
            name=name,
            kind=_KINDS.get(disturbance.how, disturbance.how),
            artefact=self.artefact,
            place=f"{disturbance.whom} {where}",
            moment=f"{self.command}, resumed",
            expected=HANGING if disturbance.how == "SIGSTOP" else EXPECTED,
            outcome=VIOLATION if problem else REFUSED if refused else RESUMED,
            sentence=sentence.replace(f"{self._yard.here}/", "")[:400],
            seconds=round(time.monotonic() - started, 1),
            problem=problem,
        )

    def _last_row(self) -> Row:
        """Lets the run come to its end, with a clock that jumps, and compares."""
        started = time.monotonic()
        process = self._start(jumping_clock=True)
        problem = ""
        try:
            if process.wait(timeout=RANKS_LIMIT) != 0:
                problem = f"resumed it ends with {process.returncode}: {self._log()}"
        except subprocess.TimeoutExpired:
            problem = f"resumed it does not end in {RANKS_LIMIT:.0f} s"
        finally:
            end_all(process)
        problem = problem or self.saved_is_whole() or self.as_undisturbed()
        return Row(
            name=f"chain{self._number}:end:clock",
            kind="clock jumps by hours, then the comparison with the undisturbed run",
            artefact=self.artefact,
            place="all ranks and the launcher",
            moment=f"{self.command}, resumed",
            expected=EXPECTED,
            outcome=VIOLATION if problem else RESUMED,
            sentence="",
            seconds=round(time.monotonic() - started, 1),
            problem=problem,
        )

    def words(self) -> list[str]:
        """The run's command, which begins it or goes on with it."""
        return self._yard.train_words(self._name, "trainer.resume=if_exists", cache=f"{self._name}_cache")

    def _start(self, *, jumping_clock: bool = False, hangs: bool = False) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        if jumping_clock:
            environment["PYTHONPATH"] = f"{Path(__file__).parent / 'jumping_clock'}:{PROJECT}"
        words = [*self.words(), *([f"alarms.hang_seconds={HANG_SECONDS}"] if hangs else [])]
        campaign = os.getpid()
        self._starts += 1
        return subprocess.Popen(
            [sys.executable, "-m", "asft_nemo", *words],
            cwd=self._yard.here,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=self._log_file().open("w"),
            start_new_session=True,
            preexec_fn=lambda: end_with(campaign),
        )

    def _await(self, moment: Moment, process: subprocess.Popen[bytes]) -> str:
        """Waits for the moment, and a random time more; returns words for it."""
        since = time.time_ns()
        steps, deadline = len(_lines(self._dir / "metrics.jsonl")), time.monotonic() + RANKS_LIMIT
        while not moment.reached(self._dir, steps, since):
            if process.poll() == 0:
                raise _HadEnded
            if process.poll() is not None:
                raise NotReached(f"it ended with {process.returncode} before {moment.words}: {self._log()}")
            if time.monotonic() > deadline:
                raise NotReached(f"{moment.words} never came")
            time.sleep(0.002)
        more = self._chance.uniform(0.0, moment.seconds)
        time.sleep(more)
        return f"{more:.3f} s behind {moment.words}"

    def _kill(self, disturbance: Disturbance, process: subprocess.Popen[bytes]) -> tuple[str, str]:
        everyone = family(process)
        number = signal.Signals[disturbance.how]
        for one in chosen(disturbance.whom, everyone):
            send(one, number)
        left = wait_for_end(everyone, ENDS_WITHIN)
        end_all(process, left)
        return "", f"{len(left)} processes go on for {ENDS_WITHIN:.0f} s" if left else ""

    def _stop(self, disturbance: Disturbance, process: subprocess.Popen[bytes]) -> tuple[str, str]:
        """Stops a rank for good: the others must find out."""
        everyone = family(process)
        stopped = chosen(disturbance.whom, everyone)
        for one in stopped:
            send(one, signal.SIGSTOP)
        left = wait_for_end(everyone, ENDS_WITHIN)
        if left:
            end_all(process, left)
            return "", f"{len(left)} processes wait for the stopped rank for {ENDS_WITHIN:.0f} s"
        said = self._log(whole=True)
        sentences = [line.removeprefix("asft: ") for line in said.splitlines() if " hangs " in line]
        try:
            code = process.wait(ENDS_WITHIN)  # its other threads may take a moment longer
        except subprocess.TimeoutExpired:
            return sentences[-1] if sentences else "", f"the launcher goes on for {ENDS_WITHIN:.0f} s"
        if code != 2 or not any(f"process {one.pid} on" in x for one in stopped for x in sentences):
            return self._log(), f"exit code {code}, and no sentence names {disturbance.whom}"
        return sentences[-1], ""

    def _disk(self) -> Disk:
        """A place of its own for what is written, which `_fill` then makes too small."""
        return Disk(self._dir, nbytes=SMALL_DISK).__enter__()

    def _fill(self, disk: Disk) -> str:
        """Words for how much room there is. Here it is small from the start: the second checkpoint does not fit."""
        return f"{SMALL_DISK} bytes of room"

    def _await_full(self, disturbance: Disturbance, process: subprocess.Popen[bytes]) -> tuple[str, str]:
        """The ranks end with a sentence, because the disk fills up."""
        try:
            code = process.wait(RANKS_LIMIT)
        except subprocess.TimeoutExpired:
            return "", f"it does not end in {RANKS_LIMIT:.0f} s on a full disk"
        lines = self._log(whole=True).splitlines()
        sentences = [line.removeprefix("asft: ") for line in lines if any(x in line for x in _FULL)]
        if code != 2 or not sentences:
            return self._log(), f"exit code {code} on a full disk"
        return sentences[-1], ""

    def _twice(self, disturbance: Disturbance, process: subprocess.Popen[bytes]) -> tuple[str, str]:
        """A second start of the same run is refused at once, and the first goes on: it takes another step."""
        before = len(_lines(self._dir / "metrics.jsonl"))
        said = run(self.words(), cwd=self._yard.here, seconds=LIMIT)
        sentence = " / ".join(said.sentences)
        if said.code != 2 or f"process {process.pid} of" not in sentence:
            return sentence, f"the second start ends with {said.code} and does not name process {process.pid}"
        deadline = time.monotonic() + LIMIT
        while len(_lines(self._dir / "metrics.jsonl")) <= before and process.poll() is None:
            if time.monotonic() > deadline:
                return sentence, "the first start does not go on"
            time.sleep(0.05)
        return sentence, "" if process.poll() in (
            None,
            0,
        ) else f"the first start ends with {process.returncode}"

    def _log_file(self) -> Path:
        """Of the latest start."""
        return self._yard.root / f"{self._name}.{self._starts}.log"

    def _log(self, *, whole: bool = False) -> str:
        text = self._log_file().read_text(errors="replace")
        return text if whole else text[-300:]

    def saved_is_whole(self) -> str:
        """Why something that was reported as saved is lost or other than undisturbed; empty where nothing is."""
        for line, usual in zip(_lines(self._dir / "metrics.jsonl"), self._undisturbed, strict=False):
            if line != usual:
                return f"step {line['step']} is not as undisturbed in metrics.jsonl"
        latest = self._dir / "checkpoints" / "latest"
        if not latest.is_symlink():
            return ""
        step = latest.resolve().name
        exported = self._exported(latest, f"{self._name}_export")
        if exported.code != 0:
            return f"the latest checkpoint, {step}, does not export: {' / '.join(exported.sentences)}"
        if digests(self._yard.here / f"{self._name}_export") != self._usual(step):
            return f"the weights of {step} are not as undisturbed"
        return ""

    def as_undisturbed(self) -> str:
        lines = _lines(self._dir / "metrics.jsonl")
        if lines != self._undisturbed:
            return f"metrics.jsonl has steps {[line['step'] for line in lines]} and is not as undisturbed"
        if (self._dir / "checkpoints" / "latest").resolve().name != f"step_{STEPS}":
            return "the run did not come to its end"
        if rows_of(self._cache) != rows_of(self._yard.here / "cache"):
            return "its reference cache has other rows than undisturbed"
        return ""

    def _usual(self, step: str) -> dict[str, str]:
        folder = self._yard.here / f"usual_{step}"
        if not folder.is_dir():
            said = self._exported(self._yard.here / "run" / "checkpoints" / step, folder.name)
            if said.code != 0:
                raise RuntimeError(f"export of {step}, undisturbed: {said.err}")
        return digests(folder)

    def _exported(self, checkpoint: Path, out: str) -> Said:
        subprocess.run(["rm", "-rf", str(self._yard.here / out)], check=True)
        return run(["export", str(checkpoint), out], cwd=self._yard.here, seconds=LIMIT)


class _HadEnded(Exception):
    """The run was done before it could be disturbed."""


@dataclass(frozen=True)
class Moment:
    """When a run is disturbed: some time behind something that its folder, or that of its cache, shows.

    Attributes:
        words: for the table.
        seconds: at most so long behind it.
        reached: whether it has come, given the run's folder, the steps it had when it was started, and when that was (ns).
    """

    words: str
    seconds: float
    reached: Callable[[Path, int, int], bool]


def _partial(folder: Path, steps: int, since: int) -> bool:
    """A checkpoint is being written; what an earlier start has left does not count."""
    return _newer((folder / "checkpoints").glob("partial_step_*"), since)


def _rows_partial(folder: Path, steps: int, since: int) -> bool:
    """Rows of a cache are being written."""
    return _newer(folder.with_name(f"{folder.name}_cache").glob("rows-*.partial"), since)


def _newer(places: Iterable[Path], since: int) -> bool:
    for place in places:
        with contextlib.suppress(FileNotFoundError):
            if place.stat().st_ctime_ns > since:
                return True
    return False


MOMENTS: dict[str, Moment] = {
    "start": Moment("its start", 15.0, lambda folder, steps, since: True),
    "training": Moment(
        "a step", 0.3, lambda folder, steps, since: len(_lines(folder / "metrics.jsonl")) > steps
    ),
    "checkpoint": Moment("the first byte of a checkpoint", 0.4, _partial),
    "cache": Moment("the first byte of a reference cache", 0.3, _rows_partial),
}
_FULL = ("disk is full", "No space left")
_KINDS = {"full": "full disk", "SIGSTOP": "hanging rank (SIGSTOP)", "twice": "two at once"}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without what depends on time or on the moment of a disturbance."""
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = []
    for text in path.read_text().split("\n")[:-1]:
        line = json.loads(text)
        found.append({key: value for key, value in line.items() if not any(x in key for x in _NOT_COMPARED)})
    return found
