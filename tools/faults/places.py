"""Faults of the place that a command writes to: a full disk, a folder or disk that may not be written, a limit, something else under the name."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faults.checks import Check, answer_of, perform
from faults.rows import REFUSED, RESUMED, SAME, VIOLATION, Row
from faults.shell import Said
from faults.yard import PLACE, Yard, eval_words, prepare_words, release

EXPECTED = (
    "one sentence and exit code 2, nothing that passes for an answer under the name that was asked for; with the fault gone, the same command makes what it makes "
    "undisturbed, bit for bit"
)
ROOMY = 1 << 30  # bytes


@dataclass(frozen=True)
class Writer:
    """A command that writes.

    Attributes:
        check: the command; it makes `PLACE/out`.
        nbytes: about what it writes.
        answer: file in what it makes without which nobody takes that for an answer; empty: what it makes appears whole or not at all.
    """

    check: Check
    nbytes: int
    answer: str = ""


def _writer(
    title: str, job: Callable[[Yard], list[str]], nbytes: int, out: str = "out", *, answer: str = ""
) -> Writer:
    return Writer(Check(title, job, (f"{PLACE}/{out}",)), nbytes, answer)


_OUT = f"{PLACE}/out"
WRITERS: dict[str, Writer] = {
    "import": _writer("asft import", lambda yard: ["import", "hf", _OUT], 5_300_000),
    "export": _writer(
        "asft export", lambda yard: ["export", "nemo", _OUT, "--max-shard-size", "2MB"], 5_300_000
    ),
    "prepare": _writer(
        "asft data prepare", lambda yard: prepare_words("train.jsonl", _OUT), 9_000, answer="manifest.json"
    ),
    "eval": _writer("asft eval", lambda yard: eval_words("hf", _OUT), 20_000, answer="results.json"),
    "compare": _writer(
        "asft compare",
        lambda yard: ["compare", "before=results", "after=results_other", "--out", _OUT],
        100_000,
    ),
    "report": _writer(
        "asft report", lambda yard: ["report", "run", "--out", f"{_OUT}.html"], 60_000, "out.html"
    ),
    "verify": _writer(
        "asft verify",
        lambda yard: ["verify", "--weights-only", "nemo", "hf", "--out", _OUT],
        1_000,
        answer="report.json",
    ),
}


@dataclass(frozen=True)
class Bad:
    """A place that is bad for a command.

    Attributes:
        name: of the row.
        writer: a key of `WRITERS`.
        kind: a key of `KINDS`.
    """

    name: str
    writer: str
    kind: str


@dataclass(frozen=True)
class Kind:
    """One way in which a place is bad.

    Attributes:
        words: for the table.
        times: how often it is tried in the long form.
        of_disk: needs a file system of its own.
    """

    words: str
    times: int
    of_disk: bool = False


KINDS: dict[str, Kind] = {
    "full": Kind("full disk", 3, of_disk=True),
    "read_only_disk": Kind("read-only disk", 1, of_disk=True),
    "read_only": Kind("read-only folder", 1),
    "limit": Kind("limit of a file's size", 1),
    "other": Kind("something else has the name", 1),
}


def bad_places(*, mounts: bool) -> Iterator[Bad]:
    """All of them; those that need a file system of their own only where one can be mounted."""
    for kind, what in KINDS.items():
        if mounts or not what.of_disk:
            for writer in WRITERS:
                for number in range(1, what.times + 1):
                    yield Bad(f"place:{kind}:{writer}:{number}", writer, kind)


class Disk:
    """A file system in the yard, in memory.

    Args:
        folder: where.
        nbytes: its size.
    """

    def __init__(self, folder: Path, *, nbytes: int = ROOMY):
        self._folder, self._nbytes = folder, nbytes

    def __enter__(self) -> Disk:
        self._folder.mkdir(exist_ok=True)
        _mount("-t", "tmpfs", "-o", f"size={self._nbytes}", "asft-faults", str(self._folder))
        return self

    def become(self, options: str) -> None:
        """Changes it, for example ``size=4096`` or ``ro``."""
        _mount("-o", f"remount,{options}", str(self._folder))

    def held(self) -> int:
        """Bytes that are taken."""
        told = os.statvfs(self._folder)
        return (told.f_blocks - told.f_bfree) * told.f_frsize

    def __exit__(self, *_: object) -> None:
        release(self._folder)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount one, and change it."""
    try:
        with Disk(folder / "mount_is_tried") as disk:
            disk.become("size=8192")
            disk.become("ro")
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def try_place(bad: Bad, yard: Yard, *, seed: int) -> Row:
    """Makes the place bad, runs, mends it, runs again, and judges."""
    started = time.monotonic()
    yard.restore()
    place = yard.here / PLACE
    place.mkdir()
    try:
        where, said, same, problem = _tried(bad, yard, random.Random(f"{seed} {bad.name}"))
    finally:
        release(place)
    check = WRITERS[bad.writer].check
    mended = RESUMED if bad.kind != "other" else REFUSED
    return Row(
        name=bad.name,
        kind=KINDS[bad.kind].words,
        artefact=f"where {check.title} writes",
        place=where,
        moment=check.title,
        expected=EXPECTED,
        outcome=VIOLATION if problem else SAME if same else mended,
        sentence=" / ".join(said.sentences).replace(f"{yard.here}/", "")[:400] if said.code else "",
        seconds=round(time.monotonic() - started, 2),
        problem=problem,
    )


def _tried(bad: Bad, yard: Yard, chance: random.Random) -> tuple[str, Said, bool, str]:
    """Where it was bad, what was said, whether it did no harm, and why the invariant is broken."""
    writer, place = WRITERS[bad.writer], yard.here / PLACE
    check = writer.check
    usual = perform(check, yard)
    if usual.code != 0:
        raise RuntimeError(f"{check.title} undisturbed: {usual.code}\n{usual.err}")
    answer = answer_of(check, yard, usual)
    _empty(place)
    where, said, problem = _HOW[bad.kind](writer, yard, chance)
    problem = problem or _judge(said)
    if problem:
        return where, said, False, problem
    if said.code == 0:
        other = answer_of(check, yard, said) != answer
        return where, said, True, "exit code 0 and something else than undisturbed" if other else ""
    left = yard.here / check.makes[0] / writer.answer
    if bad.kind != "other" and left.exists():
        return where, said, False, f"refused, and {left.relative_to(yard.here)} is there"
    _mend(bad.kind, place)
    again = perform(check, yard)
    if again.code != 0:
        problem = f"with the fault gone it ends with {again.code}: {' / '.join(again.sentences)}"
    elif answer_of(check, yard, again) != answer:
        problem = "with the fault gone it makes something else than undisturbed"
    return where, said, False, problem


def _judge(said: Said) -> str:
    if said.code is None:
        return "hangs"
    if "Traceback" in said.err:
        return f"a traceback, exit code {said.code}: {said.err[-200:]}"
    if said.code not in (0, 2):
        return f"exit code {said.code}"
    if said.code == 2 and len(said.sentences) != 1:
        return f"{len(said.sentences)} sentences instead of one"
    return ""


Tried = tuple[str, Said, str]


def _full(writer: Writer, yard: Yard, chance: random.Random) -> Tried:
    place = yard.here / PLACE
    size = max(4096, round(writer.nbytes * chance.uniform(0.02, 0.95)))
    disk = Disk(place).__enter__()
    disk.become(f"size={size}")
    return f"{size} bytes of room", perform(writer.check, yard), ""


def _read_only_disk(writer: Writer, yard: Yard, chance: random.Random) -> Tried:
    disk = Disk(yard.here / PLACE).__enter__()
    disk.become("ro")
    return "mounted read-only", perform(writer.check, yard), ""


def _read_only(writer: Writer, yard: Yard, chance: random.Random) -> Tried:
    (yard.here / PLACE).chmod(0o555)
    return "mode 555", perform(writer.check, yard, bound=True), ""


def _limit(writer: Writer, yard: Yard, chance: random.Random) -> Tried:
    largest = round(writer.nbytes * chance.uniform(0.01, 0.1))
    return f"files of at most {largest} bytes", perform(writer.check, yard, largest_file=largest), ""


def _other(writer: Writer, yard: Yard, chance: random.Random) -> Tried:
    """A file where a folder is made; a folder where a file is."""
    name = yard.here / writer.check.makes[0]
    if name.suffix:
        name.mkdir()
    else:
        name.write_text("somebody's")
    said = perform(writer.check, yard)
    untouched = name.is_dir() or (name.is_file() and name.read_text() == "somebody's")
    return "a folder" if name.suffix else "a file", said, "" if untouched else "what was there is gone"


_HOW: dict[str, Callable[[Writer, Yard, random.Random], Tried]] = {
    "full": _full,
    "read_only_disk": _read_only_disk,
    "read_only": _read_only,
    "limit": _limit,
    "other": _other,
}


def _mend(kind: str, place: Path) -> None:
    if KINDS[kind].of_disk:
        _mount("-o", f"remount,rw,size={ROOMY}", str(place))
    place.chmod(0o755)
    if kind == "other":
        _empty(place)


def _empty(place: Path) -> None:
    for path in place.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
