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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from faults.places import ROOMY, Disk
from faults.rows import REFUSED, RESUMED, VIOLATION, Row
from faults.shell import LIMIT, Said, run
from faults.yard import PROJECT, RANKS_LIMIT, STEPS, Yard, digests, release

HANG_SECONDS = 6
ENDS_WITHIN = (
    HANG_SECONDS + 60.0
)  # torchrun gives a stopped rank 30 s before it kills it, and the machine may be busy
_OF_TIME = ("seconds", "tokens_per_second", "tflops", "mfu", "memory")

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

    def __init__(self, yard: Yard, *, seed: int, number: int):
        self._yard, self._number = yard, number
        self._name = f"chain{number}"
        self._chance = random.Random(f"{seed} {self._name}")
        self._dir = yard.here / self._name
        self._undisturbed = _lines(yard.here / "run" / "metrics.jsonl")

    def disturb(self, disturbances: tuple[Disturbance, ...]) -> Iterator[Row]:
        """A row a disturbance, and one for the end."""
        for place, disturbance in enumerate(disturbances):
            yield self._row(disturbance.name(self._number, place), disturbance)
        yield self._last_row()
        release(self._dir)

    def _row(self, name: str, disturbance: Disturbance) -> Row:
        started = time.monotonic()
        disk = Disk(self._dir, nbytes=SMALL_DISK).__enter__() if disturbance.how == "full" else None
        process = self._start()
        where, sentence, problem = "", "", ""
        try:
            where = (
                f"{SMALL_DISK} bytes of room" if disk else self._await(MOMENTS[disturbance.moment], process)
            )
            act: Callable[[Disturbance, subprocess.Popen[bytes]], tuple[str, str]] = {
                "twice": self._twice,
                "SIGSTOP": self._stop,
                "full": self._fill,
            }.get(disturbance.how, self._kill)
            sentence, problem = act(disturbance, process)
        except _HadEnded:
            where = "had ended before"
        except _NotReached as error:
            problem = str(error)
        finally:
            _end_all(process)
        if disk is not None:
            disk.become(f"size={ROOMY}")
        problem = problem or self._saved_is_whole()
        refused = disturbance.how in ("twice", "SIGSTOP", "full")
        return Row(
            name=name,
            kind=_KINDS.get(disturbance.how, disturbance.how),
            artefact="training run",
            place=f"{disturbance.whom} {where}",
            moment="asft train, resumed",
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
            _end_all(process)
        problem = problem or self._saved_is_whole() or self._as_undisturbed()
        return Row(
            name=f"chain{self._number}:end:clock",
            kind="clock jumps by hours, then the comparison with the undisturbed run",
            artefact="training run",
            place="all ranks and the launcher",
            moment="asft train, resumed",
            expected=EXPECTED,
            outcome=VIOLATION if problem else RESUMED,
            sentence="",
            seconds=round(time.monotonic() - started, 1),
            problem=problem,
        )

    def words(self) -> list[str]:
        """The run's command, which begins it or goes on with it."""
        more = ("trainer.resume=if_exists", f"alarms.hang_seconds={HANG_SECONDS}")
        return self._yard.train_words(self._name, *more, cache=f"{self._name}_cache")

    def _start(self, *, jumping_clock: bool = False) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        if jumping_clock:
            environment["PYTHONPATH"] = f"{Path(__file__).parent / 'jumping_clock'}:{PROJECT}"
        return subprocess.Popen(
            [sys.executable, "-m", "asft_nemo", *self.words()],
            cwd=self._yard.here,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=(self._yard.root / f"{self._name}.log").open("w"),
            start_new_session=True,
        )

    def _await(self, moment: Moment, process: subprocess.Popen[bytes]) -> str:
        """Waits for the moment, and a random time more; returns words for it."""
        since = time.time_ns()
        steps, deadline = len(_lines(self._dir / "metrics.jsonl")), time.monotonic() + RANKS_LIMIT
        while not moment.reached(self._dir, steps, since):
            if process.poll() == 0:
                raise _HadEnded
            if process.poll() is not None:
                raise _NotReached(f"it ended with {process.returncode} before {moment.words}: {self._log()}")
            if time.monotonic() > deadline:
                raise _NotReached(f"{moment.words} never came")
            time.sleep(0.002)
        more = self._chance.uniform(0.0, moment.seconds)
        time.sleep(more)
        return f"{more:.3f} s behind {moment.words}"

    def _kill(self, disturbance: Disturbance, process: subprocess.Popen[bytes]) -> tuple[str, str]:
        everyone = _family(process)
        number = signal.Signals[disturbance.how]
        for one in _chosen(disturbance.whom, everyone):
            _send(one, number)
        left = _wait_for_end(everyone, ENDS_WITHIN)
        _end_all(process, left)
        return "", f"{len(left)} processes go on for {ENDS_WITHIN:.0f} s" if left else ""

    def _stop(self, disturbance: Disturbance, process: subprocess.Popen[bytes]) -> tuple[str, str]:
        """Stops a rank for good: the others must find out."""
        everyone = _family(process)
        chosen = _chosen(disturbance.whom, everyone)
        for one in chosen:
            _send(one, signal.SIGSTOP)
        left = _wait_for_end(everyone, ENDS_WITHIN)
        if left:
            _end_all(process, left)
            return "", f"{len(left)} processes wait for the stopped rank for {ENDS_WITHIN:.0f} s"
        said = self._log(whole=True)
        sentences = [line.removeprefix("asft: ") for line in said.splitlines() if " hangs " in line]
        code = process.wait(ENDS_WITHIN)  # its other threads may take a moment longer
        if code != 2 or not any(f"process {one.pid} on" in x for one in chosen for x in sentences):
            return self._log(), f"exit code {code}, and no sentence names {disturbance.whom}"
        return sentences[-1], ""

    def _fill(self, disturbance: Disturbance, process: subprocess.Popen[bytes]) -> tuple[str, str]:
        """Lets the disk fill up in the second checkpoint: the ranks end with a sentence."""
        try:
            code = process.wait(RANKS_LIMIT)
        except subprocess.TimeoutExpired:
            return "", f"it does not end in {RANKS_LIMIT:.0f} s on a full disk"
        sentences = [
            line.removeprefix("asft: ")
            for line in self._log(whole=True).splitlines()
            if "disk is full" in line
        ]
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

    def _log(self, *, whole: bool = False) -> str:
        text = (self._yard.root / f"{self._name}.log").read_text(errors="replace")
        return text if whole else text[-300:]

    def _saved_is_whole(self) -> str:
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

    def _as_undisturbed(self) -> str:
        lines = _lines(self._dir / "metrics.jsonl")
        if lines != self._undisturbed:
            return f"metrics.jsonl has steps {[line['step'] for line in lines]} and is not as undisturbed"
        if (self._dir / "checkpoints" / "latest").resolve().name != f"step_{STEPS}":
            return "the run did not come to its end"
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


class _NotReached(Exception):
    """The run did not come to the moment at which it was to be disturbed."""


@dataclass(frozen=True)
class Moment:
    """When a run is disturbed: some time behind something that its folder shows.

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
    found = list((folder / "checkpoints").glob("partial_step_*"))
    return any(place.exists() and place.stat().st_ctime_ns > since for place in found)


MOMENTS: dict[str, Moment] = {
    "start": Moment("its start", 15.0, lambda folder, steps, since: True),
    "training": Moment(
        "a step", 0.3, lambda folder, steps, since: len(_lines(folder / "metrics.jsonl")) > steps
    ),
    "checkpoint": Moment("the first byte of a checkpoint", 0.4, _partial),
}
_KINDS = {"full": "full disk", "SIGSTOP": "hanging rank (SIGSTOP)", "twice": "two at once"}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without what is a matter of time."""
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = []
    for text in path.read_text().split("\n")[:-1]:
        line = json.loads(text)
        found.append({key: value for key, value in line.items() if not any(x in key for x in _OF_TIME)})
    return found


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        launcher = psutil.Process(process.pid)
        return [launcher, *launcher.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _chosen(whom: str, family: list[psutil.Process]) -> list[psutil.Process]:
    """Those of a run's processes that are meant."""

    def says(one: psutil.Process, word: str) -> bool:
        try:
            return word in " ".join(one.cmdline())
        except psutil.NoSuchProcess:
            return False

    if whom == "all":
        return family
    if whom == "launcher":
        return family[:1]
    torchruns = [one for one in family if says(one, "torch.distributed.run")]
    if whom == "torchrun":
        return torchruns
    ranks = [
        one for one in family if one.is_running() and one.environ().get("RANK") == whom.removeprefix("rank ")
    ]
    ranks = [
        one for one in ranks if says(one, "asft_nemo.ranks") and one.ppid() in {x.pid for x in torchruns}
    ]
    if not ranks:
        raise _NotReached(f"there is no {whom}")
    return ranks


def _send(one: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        one.send_signal(number)


def _wait_for_end(family: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run after so long; zombies have ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        left = [one for one in family if _runs(one)]
        if not left:
            return []
        time.sleep(0.1)
    return left


def _runs(one: psutil.Process) -> bool:
    try:
        return one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end_all(process: subprocess.Popen[bytes], others: Sequence[psutil.Process] = ()) -> None:
    """Leaves nothing of a start behind, whatever became of it."""
    for one in reversed([*_family(process), *others]):
        _send(one, signal.SIGKILL)
    process.wait()
