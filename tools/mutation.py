"""Small wrong changes in objectives/ and losses/, and which of them the tests do not notice: mutmut on a copy of the tree.

    nice python tools/mutation.py --work runs/mutation --out benchmarks/results [--only losses.dense objectives] [--seconds 3000]

Every function of these packages without a decorator is changed in every way that mutmut knows, and the fast unit tests that call it are run on each change
until one fails. What was tried stays in `--work`: the same command goes on, and tries again what was not noticed, for there may be a test
now; of a module that changed itself everything is tried anew. Writes
`mutation.json` and `mutation.md`: a table by module, and every change that survived with the reason that tools/mutation_survivors.json gives. Exit code 1
where a survivor has none, 2 where outcomes are of other code than the tree's, 3 where changes are left to try. About 2,500 changes: most take
less than a second, a survivor as long as all tests that call it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

from bench import digests

ROOT = Path(__file__).resolve().parents[1]
REASONS = ROOT / "tools" / "mutation_survivors.json"
COPIED = (
    "asft_nemo",
    "eval",
    "recipes",
    "conf",
    "assets",
    "tests/*.py",
    "tests/unit/conftest.py",
    "tests/unit/losses",
    "tests/unit/objectives",
    "tests/multiproc/losses/tensor_parallel_ranks.py",
)
MUTATED = ("asft_nemo/losses", "asft_nemo/objectives")  # folders, without those in them
# jaxtyping's checks wrap mutmut's switches instead of the functions; Triton compiles the text of its kernels.
LEFT_OUT = ("tests/unit/losses/test_shapes.py", "tests/unit/losses/test_triton.py")
# A few seconds' worth of tests: every survivor runs all that call it, which numeric derivatives and drawn examples would make minutes.
SELECTED = (
    "tests/unit/objectives",
    *(
        f"tests/unit/losses/test_{name}.py"
        for name in (
            *("per_token", "gradients_wanted", "head_gradient", "vocab_shard", "head_bytes", "head_gemm"),
            *("chunks", "metrics", "dense", "vocab_parallel", "fused_linear", "ranks_in_threads"),
        )
    ),
)
PYTEST = ("-p", "no:cacheprovider", "-k", "not numeric_derivative and not any_shape")
NO_CHANGE = "a name that no change has"
SETTINGS = """
[tool.mutmut]
source_paths = ["asft_nemo"]
only_mutate = ["asft_nemo/losses/*.py", "asft_nemo/objectives/*.py"]
do_not_mutate = ["asft_nemo/losses/triton/*.py"]
also_copy = ["eval", "recipes", "conf", "assets", "tests"]
pytest_add_cli_args_test_selection = SELECTED
pytest_add_cli_args = PYTEST
process_isolation = "forkserver"
use_git_change_detection = false

"""
NOTICED = {
    1: "killed",
    3: "killed",
    -11: "crashed",
    -9: "crashed",
    24: "too slow",
    -24: "too slow",
    36: "too slow",
    152: "too slow",
    255: "too slow",
}
SURVIVED, NO_TEST, LEFT = "survived", "no test", "left"
STATES = {**NOTICED, 0: SURVIVED, 5: NO_TEST, 33: NO_TEST, None: LEFT}
INCOMPLETE = 3  # exit code


def listed() -> list[str]:
    """The files that are copied."""
    names = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--", *COPIED], capture_output=True, text=True, check=True
    ).stdout.split("\0")
    return [name for name in names if name and name not in LEFT_OUT and (ROOT / name).is_file()]


def modules_in(names: Iterable[str]) -> list[str]:
    """Those of the files whose functions are changed."""
    return [name for name in names if name.endswith(".py") and str(Path(name).parent) in MUTATED]


def tried_sources(work: Path) -> dict[str, str]:
    """Module -> digest of the source that its outcomes in `work` are of; empty where that cannot be told.

    A folder that was begun before digests were kept has the copies that mutmut changed, older than what it made of them.
    """
    kept, tried = digests.kept(work), {}
    for meta in sorted((work / "mutants" / "asft_nemo").rglob("*.meta")):
        name = str(meta.relative_to(work / "mutants")).removesuffix(".meta")
        copy, made = work / name, work / "mutants" / name
        if kept is not None:
            tried[name] = kept.get(name, "")
        elif copy.is_file() and made.is_file() and copy.stat().st_mtime < made.stat().st_mtime:
            tried[name] = digests.digest(copy)
        else:
            tried[name] = ""
    return tried


def of_other_code(work: Path) -> list[str]:
    """Modules whose outcomes are not of the tree's source."""
    now = digests.digests(ROOT, modules_in(listed()))
    return [name for name, found in tried_sources(work).items() if found != now.get(name)]


def forget(work: Path, names: list[str]) -> None:
    """Takes away what mutmut made of these modules and found, and which test calls what."""
    for name in names:
        for path in (work / name, work / "mutants" / name):
            for suffix in ("", ".meta", ".spans"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
    if names:
        (work / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)


def prepare(work: Path) -> None:
    """Copies what the tests need; what mutmut has found there stays, but of modules whose source changed."""
    work.mkdir(parents=True, exist_ok=True)
    others = of_other_code(work)
    if others:
        print(
            f"mutation: {', '.join(others)} changed, and what was found of them is dropped", file=sys.stderr
        )
    forget(work, others)
    names = listed()
    for name in names:
        source, target = ROOT / name, work / name
        if (
            not target.exists() or target.read_bytes() != source.read_bytes()
        ):  # mutmut goes by the time of a file's last change
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    digests.keep(work, digests.digests(work, modules_in(names)))
    settings = SETTINGS.replace("SELECTED", json.dumps(SELECTED)).replace("PYTEST", json.dumps(PYTEST))
    (work / "pyproject.toml").write_text(settings + pytest_settings((ROOT / "pyproject.toml").read_text()))


def pytest_settings(text: str) -> str:
    """The section about pytest of a pyproject.toml."""
    lines = text.splitlines()
    start = lines.index("[tool.pytest.ini_options]")
    inside = lines[start + 1 :]
    length = next((n for n, line in enumerate(inside) if line.startswith("[tool.")), len(inside))
    return "\n".join(lines[start : start + 1 + length]) + "\n"


def to_try(found: dict[str, str], only: list[str], unmade: Iterable[str] = ()) -> list[str]:
    """Names for mutmut, which tries again whatever it is named: what is left or was not noticed; patterns before anything was made.

    Args:
        found: outcomes.
        only: beginnings of modules' names.
        unmade: modules of which nothing was made while there is something of others.
    """
    if not found:
        return [f"asft_nemo.{name}*" for name in only]
    wanted = (LEFT, SURVIVED, NO_TEST)
    names = [
        name for name, state in found.items() if state in wanted and module_of(name).startswith(tuple(only))
    ]
    return names + [f"asft_nemo.{name}.x*" for name in unmade if name.startswith(tuple(only))]


def unmade_modules(work: Path) -> list[str]:
    """Modules that mutmut has made no changes of, as `module_of` names them."""
    names = [name for name in digests.kept(work) or {} if not (work / "mutants" / f"{name}.meta").is_file()]
    dotted = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names]
    return [name.removeprefix("asft_nemo.") for name in dotted]


def make_mutants(work: Path) -> None:
    """Has mutmut make the changes and note which test calls what; it tries none, for it is asked for one that there is not."""
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", NO_CHANGE]
    made = subprocess.run(command, cwd=work, capture_output=True, text=True)
    if not (work / "mutants" / "mutmut-stats.json").is_file() or "nothing matches" not in made.stderr:
        raise SystemExit(f"mutation: mutmut stopped early: {(made.stdout + made.stderr)[-4000:]}")


def try_mutants(work: Path, only: list[str], seconds: float | None) -> None:
    """Tries one change at a time, see `mutation_forks`, and ends that when the time is up."""
    until = None if seconds is None else time.monotonic() + seconds
    make_mutants(work)
    names = to_try(outcomes(work), only)
    (work / "names.json").write_text(json.dumps(names))
    command = [sys.executable, str(Path(__file__).with_name("mutation_forks.py")), "../names.json", "--"]
    left = None if until is None else max(until - time.monotonic(), 0)
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [*command, *PYTEST, *SELECTED],
            cwd=work / "mutants",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=left,
        )


def outcomes(work: Path) -> dict[str, str]:
    """Mutant -> what became of it."""
    found: dict[str, str] = {}
    for file in sorted((work / "mutants" / "asft_nemo").rglob("*.meta")):
        codes = json.loads(file.read_text())["exit_code_by_key"]
        found |= {name: STATES.get(code, "crashed") for name, code in codes.items()}
    return found


def changes(work: Path, names: list[str]) -> dict[str, tuple[str, str]]:
    """Mutant -> the lines it takes away and those it puts there."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    found: dict[str, tuple[str, str]] = {}
    with contextlib.chdir(work):
        for name in names:
            diff = [line for line in get_diff_for_mutant(name).splitlines() if line[:3] not in ("---", "+++")]
            was, became = (
                " ".join(line[1:].strip() for line in diff if line.startswith(sign)) for sign in "-+"
            )
            found[name] = was, became
    return found


def module_of(name: str) -> str:
    """`losses.dense` of a mutant's name."""
    return name.rpartition(".")[0].removeprefix("asft_nemo.")


def record_of(
    found: dict[str, str], changed: dict[str, tuple[str, str]], groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """Counts by module, survivors with their reasons."""
    from asft_nemo.run_dir import git_commit, versions

    reasons = {tuple(mutant): group["why"] for group in groups for mutant in group["mutants"]}
    modules: dict[str, Counter[str]] = {}
    for name, state in found.items():
        modules.setdefault(module_of(name), Counter())[state] += 1
    survivors = [
        {
            "module": module_of(name),
            "was": was,
            "became": became,
            "state": found[name],
            "why": reasons.get((module_of(name), was, became)),
        }
        for name, (was, became) in changed.items()
    ]
    return {
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "versions": versions(),
        "machine": platform.platform(),
        "modules": {name: dict(counts) for name, counts in sorted(modules.items())},
        "survivors": survivors,
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: modules, then survivors by reason."""
    commit = str(record["commit"])
    lines = [
        f"{record['date']}, commit `{commit[:9]}{commit[40:]}`.",  # and that the tree differed from it
        "",
        "| module | changes | noticed | survived | no test calls it | not tried |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    total: Counter[str] = Counter()
    for name, counts in [*record["modules"].items(), ("all", total)]:
        noticed = sum(counts.get(state, 0) for state in set(NOTICED.values()))
        cells = [
            sum(counts.values()),
            noticed,
            *(counts.get(state, 0) for state in (SURVIVED, NO_TEST, LEFT)),
        ]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
        total.update(counts)
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for row in record["survivors"]:
        by_reason.setdefault(row["why"] or "**No reason given.**", []).append(row)
    for why, rows in by_reason.items():
        lines += ["", f"{why} ({len(rows)})", "", "| module | was | became |", "| --- | --- | --- |"]
        lines += [f"| {row['module']} | {_code(row['was'])} | {_code(row['became'])} |" for row in rows]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    escaped = text.replace("|", "\\|")
    return f"`{escaped}`" if text else ""


def refusal(work: Path, found: dict[str, str]) -> str | None:
    """Says that `work` has no outcomes, or some of other code than the tree's; None where neither is so."""
    if not found:
        return f"{work} has no outcomes: run it without --again, and look at what mutmut says"
    others = of_other_code(work)
    if not others:
        return None
    return (
        f"{', '.join(others)} changed since {work} was filled: the same command without --again tries anew what concerns them, or begin with "
        "an empty --work"
    )


def main(words: list[str]) -> int:
    """Tries and writes. Returns the exit code."""
    options = _parser().parse_args(words)
    work = options.work.resolve()
    if not options.again:
        prepare(work)
        try_mutants(work, options.only, options.seconds)
    found = outcomes(work)
    if (refused := refusal(work, found)) is not None:
        print(f"mutation: {refused}", file=sys.stderr)
        return 2
    changed = changes(work, [name for name, state in found.items() if state in (SURVIVED, NO_TEST)])
    record = record_of(found, changed, json.loads(REASONS.read_text()))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "mutation.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "mutation.md").write_text(table(record))
    if not all(row["why"] for row in record["survivors"]):
        return 1
    return INCOMPLETE if LEFT in found.values() else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of mutation.json and mutation.md")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/mutation"), help="what was tried (default: %(default)s)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=["objectives", "losses"],
        metavar="MODULE",
        help="for example losses.dense",
    )
    parser.add_argument("--seconds", type=float, help="stop trying after so long")
    parser.add_argument(
        "--again", action="store_true", help="try nothing, write the table from what is there"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
