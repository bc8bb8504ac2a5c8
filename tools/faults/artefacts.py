"""Faults of artefacts: a file that a command wrote is damaged, and the next command must give what it gives undisturbed, or refuse with a sentence."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faults.checks import CHECKS, Answer, Check, answer_of, perform
from faults.damage import BOUND, BY_NAME, Damage
from faults.rows import REFUSED, SAME, VIOLATION, Row
from faults.shell import Said
from faults.targets import TARGETS, Target
from faults.yard import Yard, states

EXPECTED = (
    "the answer of an undisturbed file bit for bit, or one sentence and exit code 2; nothing else changes"
)


@dataclass(frozen=True)
class Fault:
    """One damage of one file with one next command."""

    name: str
    target: Target
    damage: Damage
    check: Check


def faults() -> Iterator[Fault]:
    """All of them, always in the same order under the same names."""
    seen: dict[str, int] = {}
    for target in TARGETS:
        for damage in target.damages:
            for check in target.checks:
                for _ in range(target.times):
                    name = f"file:{target.file}:{damage}:{check}"
                    seen[name] = seen.get(name, 0) + 1
                    yield Fault(f"{name}:{seen[name]}", target, BY_NAME[damage], CHECKS[check])


class Undisturbed:
    """What each check answers before anything is damaged, asked once."""

    def __init__(self, yard: Yard):
        self._yard, self._answers = yard, dict[int, tuple[Answer, float]]()

    def of(self, check: Check) -> Answer:
        """The answer.

        Raises:
            RuntimeError: the command fails where nothing is damaged.
        """
        if id(check) not in self._answers:
            self._yard.restore()
            said = perform(check, self._yard)
            if said.code != 0:
                raise RuntimeError(f"{check.title} undisturbed: {said.code}\n{said.out}\n{said.err}")
            self._answers[id(check)] = answer_of(check, self._yard, said), said.seconds
        return self._answers[id(check)][0]

    def seconds(self, check: Check) -> float:
        """How long it took."""
        self.of(check)
        return self._answers[id(check)][1]


def try_fault(fault: Fault, yard: Yard, undisturbed: Undisturbed, *, seed: int) -> Row:
    """Damages, runs, and judges."""
    answer = undisturbed.of(fault.check)
    yard.restore()
    chance = random.Random(f"{seed} {fault.name}")
    name = _drawn(yard, fault.target.file, chance)
    path = yard.alone(name)
    where = fault.damage(path, chance, yard.here / fault.target.twin)
    before = states(yard.here)
    there = {made for made in fault.check.makes if (yard.here / made).exists()}
    said = perform(fault.check, yard, bound=fault.damage.__name__ in BOUND)
    problem = judge(said, fault.check, yard, answer, before, there, (name, *Path(name).parts))
    refused = not problem and said.code == 2
    return Row(
        name=fault.name,
        kind=fault.damage.__name__.replace("_", " "),
        artefact=fault.target.artefact,
        place=f"{name}: {where}",
        moment=fault.check.title,
        expected=EXPECTED,
        outcome=VIOLATION if problem else REFUSED if refused else SAME,
        sentence=_shown(said, yard) if problem or refused else "",
        seconds=round(said.seconds, 2),
        problem=problem,
    )


def judge(
    said: Said,
    check: Check,
    yard: Yard,
    answer: Answer,
    before: dict[str, tuple[int, int]],
    there: set[str],
    names: tuple[str, ...],
) -> str:
    """Why the invariant is broken; empty where it holds.

    Args:
        said: what the command said.
        check: the command.
        yard: where.
        answer: what it gives undisturbed.
        before: every file, ahead of the command.
        there: what of that which the command makes was there.
        names: one of which a refusal must name: the damaged file or a folder above it.
    """
    if other := changed(check, yard, before):
        return f"changed {other}"
    if said.code is None:
        return f"hangs: did not end in {said.seconds:.0f} s"
    if "Traceback" in said.err:
        return f"a traceback, exit code {said.code}"
    if said.code == 0:
        try:
            now = answer_of(check, yard, said)
        except Exception as error:
            return f"exit code 0 and no answer ({error!r})"
        if now == answer:
            return ""
        other = sorted(
            key for key in {*now.files, *answer.files} if now.files.get(key) != answer.files.get(key)
        )
        return f"exit code 0 and another answer than undisturbed: {', '.join(other[:3]) or now.told}"
    if said.code != 2:
        return f"exit code {said.code}"
    if len(said.sentences) != 1:
        return f"{len(said.sentences)} sentences instead of one"
    if not check.reports and not any(name in said.sentences[0] for name in names):
        return "the sentence does not name the file or its folder"
    if not check.reports and any((yard.here / made).exists() and made not in there for made in check.makes):
        return "refused, and left something half-written"
    return ""


def changed(check: Check, yard: Yard, before: dict[str, tuple[int, int]]) -> str:
    """The first file that was there and is not as it was, of those that the command does not make; empty where there is none."""
    now = states(yard.here)
    for name, state in before.items():
        mine = any(name == made or name.startswith(f"{made}/") for made in check.makes)
        if not mine and now.get(name) != state:
            return name
    return ""


def _drawn(yard: Yard, pattern: str, chance: random.Random) -> str:
    """The file, or one of those that a pattern stands for."""
    if "*" not in pattern:
        return pattern
    found = sorted(yard.here.glob(pattern))
    if not found:
        raise RuntimeError(f"nothing in the yard is called {pattern}")
    return str(chance.choice(found).relative_to(yard.here))


def _shown(said: Said, yard: Yard) -> str:
    text = " / ".join(said.sentences) or said.err[-300:]
    return text.replace(f"{yard.here}/", "").replace(str(yard.here), ".")[:400]


Draw = Callable[[list[Fault]], list[Fault]]


def drawn(count: int | None, *, seed: int) -> list[Fault]:
    """All faults, or so many of them, of every artefact some."""
    every = list(faults())
    if count is None:
        return every
    chance = random.Random(f"{seed} which")
    groups: dict[str, list[Fault]] = {}
    for fault in every:
        groups.setdefault(fault.target.artefact, []).append(fault)
    for group in groups.values():
        chance.shuffle(group)
    found: list[Fault] = []
    while len(found) < count and any(groups.values()):
        found += [group.pop() for group in groups.values() if group]
    return found[:count]
