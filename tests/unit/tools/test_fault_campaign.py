"""The campaign's own bookkeeping: a tool that takes damage for good, loses something, hangs or crashes is found, and a good one is not accused."""

from __future__ import annotations

import json
import re
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from asft_nemo.config.paths import project_dir

sys.path.insert(0, str(project_dir() / "tools"))

import fault_campaign
from faults import checks, targets
from faults.artefacts import Fault, Undisturbed, drawn, faults, judge, try_fault
from faults.checks import Check
from faults.damage import BY_NAME
from faults.kills import Kill, kills, try_kill
from faults.places import KINDS, WRITERS, bad_places
from faults.rows import REFUSED, RESUMED, SAME, VIOLATION, Book, Row
from faults.shell import Said, run
from faults.targets import Target
from faults.yard import Yard

pytestmark = pytest.mark.timeout(60)

Tool = Callable[[Path], int]


def trusting(here: Path) -> int:
    """Takes whatever is there: the tool that the campaign is for."""
    (here / "out").write_bytes((here / "data" / "numbers").read_bytes())
    return 0


def careful(here: Path) -> int:
    """Holds the file against its checksum."""
    data = (here / "data" / "numbers").read_bytes()
    if zlib.crc32(data) != int((here / "data" / "sum").read_text()):
        print("asft: data/numbers is damaged: copy it again", file=sys.stderr)
        return 2
    (here / "out").write_bytes(data)
    return 0


def crashing(here: Path) -> int:
    if careful(here):
        raise ValueError("what is this?")
    return 0


def spoiling(here: Path) -> int:
    """Refuses, but has touched what it should not."""
    if code := careful(here):
        (here / "data" / "other").write_text("gone")
        return code
    return 0


def untidy(here: Path) -> int:
    if code := careful(here):
        (here / "out").write_text("half of")
        return code
    return 0


def talkative(here: Path) -> int:
    if code := careful(here):
        print("asft: and another thing", file=sys.stderr)
        return code
    return 0


def vague(here: Path) -> int:
    (here / "out").write_text("")
    if zlib.crc32((here / "data" / "numbers").read_bytes()) != int((here / "data" / "sum").read_text()):
        (here / "out").unlink()
        print("asft: something is wrong", file=sys.stderr)
        return 2
    return 0


def endless(here: Path) -> int:
    if careful(here):
        time.sleep(100)
    return 0


@pytest.fixture
def yard(tmp_path: Path) -> Yard:
    yard = Yard(tmp_path)
    (yard.pristine / "data").mkdir(parents=True)
    data = bytes(range(200))
    (yard.pristine / "data" / "numbers").write_bytes(data)
    (yard.pristine / "data" / "sum").write_text(str(zlib.crc32(data)))
    (yard.pristine / "data" / "other").write_text("here")
    return yard


def fault_of(tool: Tool, damage: str = "flipped") -> Fault:
    check = Check(tool.__name__, lambda yard: lambda: tool(yard.here), ("out",))
    target = Target("numbers", "data/numbers", (damage,), ())
    return Fault(f"data/numbers:{damage}", target, BY_NAME[damage], check)


def row_of(tool: Tool, yard: Yard, damage: str = "flipped") -> Row:
    return try_fault(fault_of(tool, damage), yard, Undisturbed(yard), seed=3)


@pytest.mark.parametrize(
    ("tool", "problem"),
    [
        (trusting, "exit code 0 and another answer than undisturbed: out"),
        (crashing, "a traceback, exit code 1"),
        (spoiling, "changed data/other"),
        (untidy, "refused, and left something half-written"),
        (talkative, "2 sentences instead of one"),
        (vague, "the sentence does not name the file or its folder"),
        (endless, r"hangs: did not end in \d+ s"),
    ],
)
def test_a_broken_tool_is_found(
    tool: Tool, problem: str, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, undisturbed = fault_of(tool), Undisturbed(yard)
    undisturbed.of(fault.check)
    if tool is endless:  # the others may take as long as a busy machine lets them
        monkeypatch.setattr(checks, "LIMIT", 1.0)
    row = try_fault(fault, yard, undisturbed, seed=3)
    assert row.outcome == VIOLATION
    assert re.fullmatch(problem, row.problem), row.problem


@pytest.mark.parametrize("damage", ["flipped", "truncated", "tail_cut", "emptied", "grown", "zeroed"])
def test_a_careful_tool_is_not_accused(damage: str, yard: Yard) -> None:
    row = row_of(careful, yard, damage)
    assert (row.outcome, row.problem) == (REFUSED, "")
    assert row.sentence == "data/numbers is damaged: copy it again"
    assert row.kind == damage.replace("_", " ")


def test_damage_that_changes_nothing_is_the_same(yard: Yard) -> None:
    fault = fault_of(careful)
    fault = Fault(fault.name, Target("numbers", "data/other", ("flipped",), ()), fault.damage, fault.check)
    assert try_fault(fault, yard, Undisturbed(yard), seed=0).outcome == SAME


def test_a_fault_is_the_same_again_and_the_next_is_another(yard: Yard) -> None:
    first, again = (row_of(careful, yard).place for _ in range(2))
    other = try_fault(fault_of(careful), yard, Undisturbed(yard), seed=4).place
    assert first == again != other


def test_what_is_undisturbed_is_put_back(yard: Yard) -> None:
    row_of(spoiling, yard)
    yard.restore()
    assert (yard.here / "data" / "other").read_text() == "here"
    assert (yard.here / "data" / "numbers").read_bytes() == bytes(range(200))


def test_an_undisturbed_command_that_fails_is_no_fault(yard: Yard) -> None:
    (yard.pristine / "data" / "sum").write_text("1")
    with pytest.raises(RuntimeError, match="careful undisturbed: 2"):
        row_of(careful, yard)


def test_modes_bind_whoever_runs_it(tmp_path: Path) -> None:
    """Also root, which would read what nobody may."""
    file = tmp_path / "secret"
    file.write_text("x")
    file.chmod(0)
    said = run(lambda: len(file.read_text()), cwd=tmp_path, seconds=20, bound=True)
    assert "PermissionError" in said.err


def test_a_kill_is_followed_by_the_same_command(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(here: Path) -> int:
        time.sleep(0.2)
        return careful(here)

    def forgetful(here: Path) -> int:
        """Takes what a killed start has left for its own work."""
        left = here / "left"
        if left.exists():
            (here / "out").write_text("short")
            return 0
        left.write_text("")
        time.sleep(0.2)
        return careful(here)

    for tool, outcome in ((slow, RESUMED), (forgetful, VIOLATION)):
        check = Check("a tool", lambda yard, tool=tool: lambda: tool(yard.here), ("out",))
        monkeypatch.setitem(sys.modules["faults.kills"].WORK, "tool", check)
        rows = [
            try_kill(Kill(f"kill:{n}", "tool", "SIGKILL"), yard, Undisturbed(yard), seed=n) for n in range(6)
        ]
        assert outcome in {row.outcome for row in rows}
        assert {row.outcome for row in rows} <= {outcome, RESUMED}


@pytest.mark.parametrize(("left", "outcome"), [("whole", REFUSED), ("half", VIOLATION), ("", RESUMED)])
def test_a_command_may_refuse_after_a_kill_only_what_is_whole(
    left: str, outcome: str, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal may come behind the last of its work."""

    def tool(here: Path) -> int:
        if (here / "out").exists():
            print("asft: out exists already: choose another path", file=sys.stderr)
            return 2
        (here / "out").write_text("whole")
        return 0

    def killed(kill: Kill, check: Check, yard: Yard, *_: object) -> tuple[str, str, str]:
        if left:
            (yard.here / "out").write_text(left)
        return "", "", ""

    module = sys.modules["faults.kills"]
    monkeypatch.setitem(module.WORK, "tool", Check("a tool", lambda yard: lambda: tool(yard.here), ("out",)))
    monkeypatch.setattr(module, "_killed", killed)
    row = try_kill(Kill("kill:1", "tool", "SIGKILL"), yard, Undisturbed(yard), seed=0)
    assert row.outcome == outcome


def test_names_are_different_and_stay(yard: Yard) -> None:
    every = list(faults())
    names = [fault.name for fault in every]
    assert len(set(names)) == len(names)
    assert len(names) >= 180
    assert names == [fault.name for fault in faults()]
    short = drawn(45, seed=0)
    assert {fault.name for fault in short} <= set(names)
    assert [x.name for x in short] == [x.name for x in drawn(45, seed=0)]
    assert {x.target.artefact for x in short} == {target.artefact for target in targets.TARGETS}
    others = [x.name for x in bad_places(mounts=True)] + [x.name for x in kills(2)]
    assert len(set(others)) == len(others)
    assert {x.kind for x in bad_places(mounts=False)} == {k for k, v in KINDS.items() if not v.of_disk}
    assert {x.writer for x in bad_places(mounts=True)} == set(WRITERS)


def test_the_book_counts_and_says_how_to_repeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = Book(seed=7, planned=2)
    good = Row("a:1", "flipped", "x", "byte 1", "asft export", "e", REFUSED, "no | good", 0.1)
    book.add(good)
    book.add(Row("a:2", "missing", "x", "gone", "asft export", "e", VIOLATION, "", 0.2, "a traceback"))
    assert "again: --seed 7 --only 'a:2'" in capsys.readouterr().err
    book.write(tmp_path, called="python tools/fault_campaign.py", notes=["a note"])
    values = json.loads((tmp_path / "fault_campaign.json").read_text())
    assert (values["faults"], values["violations"], values["seed"]) == (2, 1, 7)
    page = (tmp_path / "fault_campaign.md").read_text()
    assert "| x | flipped, missing | 2 | 0 | 0 | 1 | 1 |" in page
    assert "no \\| good" in page
    assert "**a traceback**" in page


def test_parts_are_joined_and_what_is_tried_again_counts_once(tmp_path: Path) -> None:
    def row(name: str, outcome: str) -> Row:
        return Row(name, "k", "a", "p", "m", "e", outcome, "", 0.0, "bad" if outcome == VIOLATION else "")

    part = Book(seed=1, planned=3)
    for one in (row("a", SAME), row("b", VIOLATION), row("gone", VIOLATION)):
        part.add(one)
    part.write(tmp_path, called="", notes=[])
    book = Book(seed=1, planned=1)
    book.join(tmp_path, {"a", "b"})
    assert [x.name for x in book.rows] == ["a", "b"]
    book.add(row("b", REFUSED))
    assert ([x.name for x in book.rows], book.violations) == (["a", "b"], 0)
    with pytest.raises(ValueError, match="is of seed 1, this is 2"):
        Book(seed=2, planned=0).join(tmp_path, {"a"})


def test_an_answer_that_cannot_be_read_is_a_violation(yard: Yard) -> None:
    check = Check("x", lambda yard: [], (), lambda said: json.loads(said.out))
    yard.restore()
    problem = judge(Said(0, "{", "", 0.1), check, yard, checks.Answer({}, {}), {}, set(), ("x",))
    assert problem.startswith("exit code 0 and no answer")


@pytest.mark.timeout(300)  # the first look imports matplotlib, transformers and torch
def test_exit_code_says_whether_something_was_violated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"good": REFUSED, "bad": VIOLATION}
    for name, outcome in rows.items():
        row = Row(name, "k", "a", "p", "m", "e", outcome, "", 0.0)
        one = fault_campaign.Try(name, lambda row=row: row)
        monkeypatch.setattr(fault_campaign, "_tries", lambda *_, one=one, **__: [one])
        monkeypatch.setattr(fault_campaign, "_chains", lambda *_, **__: {})
        monkeypatch.setattr(Yard, "make", lambda self: None)
        code = fault_campaign.main(["--short", "--out", str(tmp_path / name)])
        assert code == (1 if outcome == VIOLATION else 0)
        assert (tmp_path / name / "fault_campaign.md").is_file()
