"""Commands without ranks that are killed at a random moment, stopped while another does the same, or find a clock that jumped; then done again.

Each must end with what an undisturbed command makes, bit for bit.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faults.artefacts import Undisturbed, changed
from faults.checks import CHECKS, Check, answer_of, perform
from faults.jumping_clock.jumps import jump
from faults.rows import REFUSED, RESUMED, SAME, VIOLATION, Row
from faults.shell import LIMIT, Running, Said, run
from faults.shell import perform as done
from faults.yard import Yard, prepare_words, states

KILLED = "the same command, started again, makes what it makes undisturbed, bit for bit, or refuses because all of it is there; nothing else changes"
DOUBLED = (
    "the second is refused at once with a sentence, exit code 2; the first makes what it makes undisturbed"
)
JUMPED = "what it makes undisturbed, bit for bit, but for words that say when or how long"

_ATTEMPTS = 10
_PREPARE = Check("asft data prepare", lambda yard: prepare_words("train.jsonl", "new"), ("new",))
WORK: dict[str, Check] = {
    "import": CHECKS["import"],
    "export": CHECKS["export"],
    "prepare": _PREPARE,
    "eval": CHECKS["eval"],
    "compare": CHECKS["compare"],
    "report": CHECKS["report"],
}


@dataclass(frozen=True)
class Kill:
    """One command, and how it is disturbed.

    Attributes:
        name: of the row.
        work: a key of `WORK`.
        how: ``SIGKILL``, ``SIGTERM``, ``twice`` or ``clock``.
    """

    name: str
    work: str
    how: str


def kills(times: int) -> Iterator[Kill]:
    """All of them, `times` kills of each command and signal."""
    for number in range(1, times + 1):
        for work in WORK:
            for how in ("SIGKILL", "SIGTERM"):
                yield Kill(f"kill:{work}:{how}:{number}", work, how)
    for work in ("import", "export", "prepare"):
        yield Kill(f"kill:{work}:twice", work, "twice")


def clocks() -> Iterator[Kill]:
    """Every command under a clock that jumps."""
    for work in WORK:
        yield Kill(f"clock:{work}", work, "clock")


def try_kill(kill: Kill, yard: Yard, undisturbed: Undisturbed, *, seed: int) -> Row:
    """Disturbs, does it again, and judges."""
    if kill.how == "clock":
        return _jumped(kill, yard, undisturbed)
    check = WORK[kill.work]
    answer, usual = undisturbed.of(check), undisturbed.seconds(check)
    yard.restore()
    before = states(yard.here)
    started, chance = time.monotonic(), random.Random(f"{seed} {kill.name}")
    does: Callable[..., tuple[str, str, str]] = _twice if kill.how == "twice" else _killed
    place, problem, sentence = does(kill, check, yard, chance, usual)
    good = REFUSED if kill.how == "twice" else RESUMED
    if not problem:
        said = perform(check, yard) if kill.how != "twice" else Said(0, "", "", 0.0)
        if (
            said.code == 2 and len(said.sentences) == 1
        ):  # right where the signal came behind the last of its work
            good, sentence = REFUSED, said.sentences[0]
        elif said.code != 0:
            problem, sentence = f"started again it ends with {said.code}", " / ".join(said.sentences)
        if not problem and answer_of(check, yard, said).files != answer.files:
            problem = f"{'refused, with' if said.code else ''} another result than undisturbed".strip()
        elif other := changed(check, yard, before):
            problem = problem or f"changed {other}"
    return Row(
        name=kill.name,
        kind="two at once" if kill.how == "twice" else f"{kill.how} of the process",
        artefact=check.title,
        place=place,
        moment=check.title,
        expected=DOUBLED if kill.how == "twice" else KILLED,
        outcome=VIOLATION if problem else good,
        sentence=sentence.replace(f"{yard.here}/", "")[:400],
        seconds=round(time.monotonic() - started, 2),
        problem=problem,
    )


def _jumped(kill: Kill, yard: Yard, undisturbed: Undisturbed) -> Row:
    """The whole command under a clock that jumps."""
    check = WORK[kill.work]
    answer = undisturbed.of(check)
    yard.restore()

    def under_it() -> int:
        jump()
        return done(check.job(yard))

    said = run(under_it, cwd=yard.here, seconds=LIMIT)
    problem = f"ends with {said.code}: {said.err[-200:]}" if said.code != 0 else ""
    if not problem and answer_of(check, yard, said).files != answer.files:
        problem = "another result than undisturbed"
    return Row(
        name=kill.name,
        kind="clock jumps by hours",
        artefact=check.title,
        place="at every look",
        moment=check.title,
        expected=JUMPED,
        outcome=VIOLATION if problem else SAME,
        sentence="",
        seconds=round(said.seconds, 2),
        problem=problem,
    )


def _killed(
    kill: Kill, check: Check, yard: Yard, chance: random.Random, usual: float
) -> tuple[str, str, str]:
    for _ in range(_ATTEMPTS):
        running = Running(check.job(yard), cwd=yard.here)
        after = chance.uniform(0.0, usual)
        time.sleep(after)
        running.send(signal.Signals[kill.how])
        said = running.wait(LIMIT)
        if said.code is None:
            return f"after {after:.2f} s", "does not end", ""
        if said.code != 0:
            return f"after {after:.2f} s of about {usual:.2f}", "", ""
        yard.restore()  # it had ended before the signal came: that was no kill
        usual = min(usual, said.seconds)
    return "", f"{_ATTEMPTS} times it had ended before the signal came", ""


def _twice(kill: Kill, check: Check, yard: Yard, chance: random.Random, usual: float) -> tuple[str, str, str]:
    """Stops the first once it has begun to write, so that the second surely meets it."""
    target = yard.here / check.makes[0]
    partial = target.with_name(f".{target.name}.partial")  # what is in it is written behind its lock
    for _ in range(_ATTEMPTS):
        first = Running(check.job(yard), cwd=yard.here)
        deadline = time.monotonic() + LIMIT
        while first.alive() and not _writes(target, partial) and time.monotonic() < deadline:
            time.sleep(0.0005)
        first.send(signal.SIGSTOP)
        if first.alive() and _writes(target, partial):  # and had not written the last of it in between
            break
        first.send(signal.SIGKILL)
        unseen = first.wait(LIMIT)
        yard.restore()
    else:
        return "", f"{_ATTEMPTS} times the first was not seen to write", " / ".join(unseen.sentences)
    second = perform(check, yard)
    first.send(signal.SIGCONT)
    ended = first.wait(LIMIT)
    sentence = " / ".join(second.sentences)
    if ended.code != 0:
        return "", f"the first ends with {ended.code}: {ended.err[-200:]}", sentence
    if second.code != 2 or "Traceback" in second.err or len(second.sentences) != 1:
        return "", f"the second ends with {second.code}", sentence
    return "while the first was writing", "", sentence


def _writes(target: Path, partial: Path) -> bool:
    """Whether something is half written there."""
    try:
        return (target / "unfinished").exists() or any(partial.iterdir())
    except FileNotFoundError:  # it is not there yet, or no longer
        return False
