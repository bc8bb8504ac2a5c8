"""The report of wrong changes that no test noticed: what is copied, counted and argued."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path.insert(0, str(TOOLS))

import mutation as tool  # noqa: E402

DENSE = "asft_nemo.losses.dense.x_dense_loss__mutmut_"
TABLE = "asft_nemo.objectives.table.x_names__mutmut_"


def test_what_is_copied_can_be_changed_and_tested(tmp_path: Path) -> None:
    tool.prepare(tmp_path)
    assert (tmp_path / "asft_nemo" / "losses" / "dense.py").is_file()
    assert (tmp_path / "tests" / "unit" / "losses" / "loss_cases.py").is_file()
    assert not (tmp_path / "tests" / "unit" / "losses" / "test_shapes.py").exists()
    settings = (tmp_path / "pyproject.toml").read_text()
    assert settings.count("[tool.") == 2
    assert "--import-mode=importlib" in settings
    assert 'source_paths = ["asft_nemo"]' in settings
    before = (tmp_path / "asft_nemo" / "losses" / "dense.py").stat().st_mtime_ns
    tool.prepare(tmp_path)
    assert (tmp_path / "asft_nemo" / "losses" / "dense.py").stat().st_mtime_ns == before, (
        "it would be tried anew"
    )


def test_outcomes_are_mutmuts(tmp_path: Path) -> None:
    folder = tmp_path / "mutants" / "asft_nemo" / "losses"
    folder.mkdir(parents=True)
    codes = {
        f"{DENSE}1": 1,
        f"{DENSE}2": 0,
        f"{DENSE}3": None,
        f"{DENSE}4": 33,
        f"{DENSE}5": 36,
        f"{DENSE}6": -11,
        f"{DENSE}7": 3,
    }
    (folder / "dense.py.meta").write_text(json.dumps({"exit_code_by_key": codes}))
    assert list(tool.outcomes(tmp_path).values()) == [
        "killed",
        "survived",
        "left",
        "no test",
        "too slow",
        "crashed",
        "killed",
    ]


def test_what_is_left_or_was_not_noticed_is_tried() -> None:
    assert tool.to_try({}, ["objectives", "losses.dense"]) == [
        "asft_nemo.objectives*",
        "asft_nemo.losses.dense*",
    ]
    found = {
        f"{DENSE}1": "killed",
        f"{DENSE}2": "survived",
        f"{DENSE}3": "left",
        f"{TABLE}1": "no test",
        f"{TABLE}2": "too slow",
    }
    assert tool.to_try(found, ["losses"]) == [f"{DENSE}2", f"{DENSE}3"]
    assert tool.to_try(found, ["objectives", "losses"]) == [f"{DENSE}2", f"{DENSE}3", f"{TABLE}1"]


def test_survivors_are_counted_by_module_and_told_with_their_reason() -> None:
    found = {
        f"{DENSE}1": "killed",
        f"{DENSE}2": "survived",
        f"{TABLE}1": "no test",
        f"{TABLE}2": "left",
        f"{TABLE}3": "too slow",
    }
    changed = {f"{DENSE}2": ("a | b", "a"), f"{TABLE}1": ("x", "y")}
    groups = [{"why": "It is the same.", "mutants": [["losses.dense", "a | b", "a"]]}]
    record = tool.record_of(found, changed, groups)
    text = tool.table({**record, "commit": f"{'0123456789' * 4}+changes"})
    assert f"{record['date']}, commit `012345678+changes`.\n" in text
    assert "| losses.dense | 2 | 1 | 1 | 0 | 0 |" in text
    assert "| objectives.table | 3 | 1 | 0 | 1 | 1 |" in text
    assert "| all | 5 | 2 | 1 | 1 | 1 |" in text
    assert "It is the same. (1)\n" in text
    assert r"| losses.dense | `a \| b` | `a` |" in text
    assert "**No reason given.** (1)" in text
    assert "| objectives.table | `x` | `y` |" in text


def test_a_change_is_told_as_mutmut_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffs = pytest.importorskip("mutmut.mutation.diff_apply")
    diff = (
        "--- a\n+++ b\n@@ -1 +1 @@\n def f(x):\n-    return (x\n-        + 1)\n+    return (x\n+        - 1)"
    )
    monkeypatch.setattr(diffs, "get_diff_for_mutant", lambda name: diff)
    assert tool.changes(tmp_path, [f"{DENSE}2"]) == {f"{DENSE}2": ("return (x + 1)", "return (x - 1)")}


ONE, TWO = "asft_nemo/losses/one.py", "asft_nemo/losses/two.py"
CODE = "def half(x):\n    return x // 2\n"
TESTED = "from asft_nemo.losses.{0} import half\n\n\ndef test_{0}():\n    assert half(9) == 4\n"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with two modules and a test of each. The tool works on it instead of on ours."""
    folder = tmp_path / "tree"
    for name, text in {
        "asft_nemo/__init__.py": "",
        "asft_nemo/losses/__init__.py": "",
        ONE: CODE,
        TWO: CODE,
        "tests/unit/losses/test_one.py": TESTED.format("one"),
        "tests/unit/losses/test_two.py": TESTED.format("two"),
        "pyproject.toml": "[tool.pytest.ini_options]\naddopts = ''\n",
        "reasons.json": "[]",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for words in (("init", "--quiet"), ("add", ".")):
        subprocess.run(["git", "-C", folder, *words], check=True, timeout=60)
    monkeypatch.setattr(tool, "ROOT", folder)
    monkeypatch.setattr(tool, "REASONS", folder / "reasons.json")
    monkeypatch.setattr(tool, "SELECTED", ("tests/unit/losses",))
    return folder


def found_in(work: Path) -> dict[str, str]:
    return {name.removeprefix("asft_nemo.losses."): state for name, state in tool.outcomes(work).items()}


def try_all(work: Path, only: list[str], seconds: float | None) -> None:
    """What mutmut leaves: beside each module what it made of it, what became of that, and which test calls what."""
    for name in (ONE, TWO):
        made = work / "mutants" / name
        made.parent.mkdir(parents=True, exist_ok=True)
        if not made.with_name(made.name + ".meta").exists():
            made.write_text("changed")
            key = name.removesuffix(".py").replace("/", ".") + ".x_half__mutmut_1"
            made.with_name(made.name + ".meta").write_text(json.dumps({"exit_code_by_key": {key: 1}}))
    (work / "mutants" / "mutmut-stats.json").write_text("{}")


@pytest.fixture
def filled(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work folder with outcomes of both modules."""
    monkeypatch.setattr(tool, "try_mutants", try_all)
    work = tmp_path / "work"
    assert tool.main(["--work", str(work), "--out", str(tmp_path / "first")]) == 0
    return work


KILLED = {"one.x_half__mutmut_1": "killed", "two.x_half__mutmut_1": "killed"}


@pytest.mark.parametrize("with_digests", [True, False])
def test_outcomes_of_a_module_that_changed_are_dropped_and_no_others(
    filled: Path, tree: Path, with_digests: bool
) -> None:
    """Also where the folder was filled before digests were kept."""
    (tree / "tests/unit/losses/test_one.py").write_text("def test_more():\n    pass\n")
    tool.prepare(filled)
    assert found_in(filled) == KILLED, "tests may change: so it is that survivors are tried again"
    if not with_digests:
        (filled / "sources.json").unlink()
    (tree / TWO).write_text("def half(x):\n    return x / 2\n")
    os.utime(tree / TWO, (0, 0))  # what is older than what mutmut made can still be another source
    tool.prepare(filled)
    assert found_in(filled) == {"one.x_half__mutmut_1": "killed"}
    assert not (filled / "mutants" / TWO).exists(), "mutmut leaves alone what is newer than its source"
    assert not (filled / "mutants" / "mutmut-stats.json").exists(), "which tests call what may have changed"
    assert (filled / TWO).read_text() == (tree / TWO).read_text()
    assert tool.unmade_modules(filled) == ["losses", "losses.two"]
    names = tool.to_try(tool.outcomes(filled), ["losses"], tool.unmade_modules(filled))
    assert names == ["asft_nemo.losses.x*", "asft_nemo.losses.two.x*"]
    assert json.loads((filled / "sources.json").read_text()).keys() == {
        "asft_nemo/losses/__init__.py",
        ONE,
        TWO,
    }


def test_a_copy_that_is_newer_than_what_was_made_of_it_is_not_what_was_tried(filled: Path) -> None:
    (filled / "sources.json").unlink()
    later = (filled / "mutants" / TWO).stat().st_mtime + 1
    os.utime(filled / TWO, (later, later))
    assert tool.of_other_code(filled) == [TWO]


def test_a_module_that_is_gone_leaves_nothing(filled: Path, tree: Path) -> None:
    subprocess.run(["git", "-C", tree, "rm", "--quiet", "--force", TWO], check=True, timeout=60)
    tool.prepare(filled)
    assert found_in(filled) == {"one.x_half__mutmut_1": "killed"}
    assert not (filled / TWO).exists()


@pytest.mark.parametrize("when", ["before", "while"])
def test_outcomes_of_other_code_are_not_written(
    when: str,
    filled: Path,
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def change(*given: object) -> None:
        (tree / TWO).write_text("def half(x):\n    return x / 2\n")

    words = ["--work", str(filled), "--out", str(tmp_path / "out")]
    assert tool.main([*words, "--again"]) == 0
    (tmp_path / "out" / "mutation.json").unlink()
    if when == "before":
        change()
        words.append("--again")
    monkeypatch.setattr(tool, "try_mutants", change)
    assert tool.main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        f"mutation: {TWO} changed since {filled} was filled: the same command without --again "
    )
    assert said.endswith("or begin with an empty --work")
    assert not (tmp_path / "out" / "mutation.json").exists()
    assert found_in(filled) == KILLED, "nothing is lost"


def test_a_work_folder_of_nothing_has_no_table(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--work", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--again"]) == 2
    assert "has no outcomes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_mutmut_tries_anew_what_changed_and_keeps_the_rest(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command with mutmut itself, whose outcomes of a function that is as it was would stay otherwise."""
    pytest.importorskip("mutmut")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    work, words = tmp_path / "work", ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    (tree / TWO).write_text("DIVISOR = 2\n\n\ndef half(x):\n    return x // DIVISOR\n")
    assert tool.main(words) == 0, tool.outcomes(work)
    first = found_in(work)
    assert {name.partition(".")[0] for name in first} == {"one", "two"}
    assert set(first.values()) == {"killed"}
    kept = work / "mutants" / f"{ONE}.meta"
    before = kept.stat().st_mtime_ns
    (tree / "tests/unit/losses/test_two.py").write_text(
        "from asft_nemo.losses import two\n\n\ndef test_two():\n    two.half(0)\n"
    )
    (tree / TWO).write_text("DIVISOR = 3\n\n\ndef half(x):\n    return x // DIVISOR\n")
    assert tool.main(words) == 1, "now there are survivors"
    second = found_in(work)
    assert second.keys() == first.keys()
    assert {state for name, state in second.items() if name.startswith("two")} >= {"survived"}
    assert kept.stat().st_mtime_ns == before, "of the other module nothing was tried"
