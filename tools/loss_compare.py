"""Whether a change leaves training as it was: short seeded runs at two commits, metrics compared step by step.

    python tools/loss_compare.py A B            two commits
    python tools/loss_compare.py A              a commit, and the files of this working tree as they are
    python tools/loss_compare.py --golden       writes tests/golden/steps anew from this working tree

Every commit trains from a tree of its own with this Python's packages: the model that ships, a few rows, each objective on one rank and at
TP2 x PP2. The table goes to the screen, and with `--out` to `<name>.json` and `<name>.md`. Exit code 0 where every metric is the same to the bit, or
no further apart than `--tolerance`; 1 where one is; 2 where nothing can be compared, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench import loss_runs
from bench.compared import Difference, difference

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "steps"
KEPT = ("step", "loss", "nll", "kl", "kl_reverse", "token_weight", "grad_norm")  # of a golden run
BEYOND, REFUSED = 1, 2  # exit codes
POLL_SECONDS = 0.5


class RefusedError(Exception):
    """Nothing can be compared; the message says why, and what to do."""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        name: for the table and the screen.
        commit: what it is, or what the working tree started from.
        subject: the commit's first line, or how many files of the working tree differ.
        tree: folder with its files.
    """

    name: str
    commit: str
    subject: str
    tree: Path


@dataclass(frozen=True)
class Asked:
    """What is to be trained on both sides."""

    objectives: tuple[str, ...]
    layouts: tuple[str, ...]
    steps: int

    def runs(self) -> list[tuple[str, str]]:
        """(objective, layout) of every run."""
        return [(objective, layout) for layout in self.layouts for objective in self.objectives]


def git(*words: str) -> str:
    """What git says in this repository.

    Raises:
        RefusedError: it fails.
    """
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        raise RefusedError(f"git {words[0]} failed in {ROOT}: {done.stderr.strip()}")
    return done.stdout.strip()


def commit_of(named: str) -> str:
    """The full name of a commit.

    Raises:
        RefusedError: there is none.
    """
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{named}^{{commit}}")
    except RefusedError:
        raise RefusedError(f"{named} is no commit of {ROOT}: name one that git log shows") from None


@contextlib.contextmanager
def tree_of(commit: str, folder: Path) -> Iterator[Side]:
    """A commit's files in a worktree, which is taken away at the end."""
    git("worktree", "add", "--quiet", "--detach", str(folder), commit)
    try:
        yield Side(commit[:9], commit, git("log", "-1", "--format=%s", commit), folder)
    finally:
        git("worktree", "remove", "--force", str(folder))


def working_tree(folder: Path) -> Side:
    """A copy of the working tree's files, ignored ones left out, so that editing goes on while it is trained.

    Raises:
        RefusedError: amid a merge.
    """
    if unmerged := git("diff", "--name-only", "--diff-filter=U"):
        raise RefusedError(f"{unmerged.splitlines()[0]} is not merged yet: finish the merge first")
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        source = ROOT / name
        if name and source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    changed = len(git("status", "--porcelain").splitlines())
    subject = f"the working tree, {changed} files of it changed" if changed else "the working tree, unchanged"
    return Side("working tree", git("rev-parse", "HEAD"), subject, folder)


def check_can_train(side: Side) -> None:
    """Raises RefusedError where a tree has not what the runs need."""
    needed = {
        "asft_nemo/launch_local.py": "def launch_many",
        "asft_nemo/config/load.py": "def compose",
        "recipes/tiny_cpu.py": "def fragment",
        "assets/tiny-base/model.safetensors": "",
    }
    for name, text in needed.items():
        file = side.tree / name
        if not file.is_file() or (text and text not in file.read_text()):
            raise RefusedError(
                f"{side.name} cannot train these runs, {name} is missing or has no {text or 'weights'}: name a later commit"
            )


def trained(side: Side, asked: Asked, folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Trains a tree's runs; (objective, layout) -> what each logged.

    Raises:
        RefusedError: a run failed.
    """
    folder.mkdir(parents=True)
    rows = loss_runs.write_rows(folder / "rows.jsonl")
    places = {run: folder / "-".join(run) for run in asked.runs()}
    words = [
        loss_runs.words_of(*run, steps=asked.steps, rows=rows, run_dir=place) for run, place in places.items()
    ]
    (folder / "runs.json").write_text(json.dumps(words))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{side.tree}{os.pathsep}{side.tree / 'eval'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        str(ROOT / "tools" / "bench" / "loss_runs.py"),
        str(folder / "runs.json"),
        str(side.tree),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=side.tree, env=environment, stdout=log, stderr=log
        )  # ranks look in their folder first
        try:
            _watch(process, side, places, asked.steps)
        finally:
            process.terminate()
            process.wait()
    if process.returncode:
        end = (folder / "log").read_text(errors="replace").strip()[-2000:]
        raise RefusedError(f"{side.name} could not train the runs:\n{end}")
    return {run: loss_runs.metrics(place) for run, place in places.items()}


def _watch(
    process: subprocess.Popen[bytes], side: Side, places: dict[tuple[str, str], Path], steps: int
) -> None:
    """Waits, and says how many steps are done whenever that changes."""
    done = -1
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        files = [place / "metrics.jsonl" for place in places.values()]
        now = sum(file.read_text().count("\n") for file in files if file.exists())
        if now != done:
            done = now
            print(f"\r{side.name}: step {done} of {len(places) * steps}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def compare(first: Side, second: Side, asked: Asked, scratch: Path) -> dict[tuple[str, str], Difference]:
    """Trains both, one after the other, and compares run by run."""
    for side in (first, second):
        check_can_train(side)
    one, other = (trained(side, asked, scratch / f"runs_{n}") for n, side in enumerate((first, second)))
    return {run: difference(one[run], other[run]) for run in asked.runs()}


def record_of(
    sides: Sequence[Side], asked: Asked, found: dict[tuple[str, str], Difference], *, tolerance: float
) -> dict[str, Any]:
    """All of it, for JSON."""
    from asft_nemo.run_dir import versions

    return {
        "date": date.today().isoformat(),
        "commits": [{"commit": side.commit, "is": side.subject} for side in sides],
        "versions": versions(),
        "machine": platform.platform(),
        "steps": asked.steps,
        "tolerance": tolerance,
        "within": all(row.size <= tolerance for row in found.values()),
        "runs": [
            {
                "objective": objective,
                "layout": layout,
                "difference": row.size if row.size != float("inf") else None,  # strict JSON has no infinity
                "bits": row.bits,
                "said": row.said(),
                "added": list(row.added),
            }
            for (objective, layout), row in found.items()
        ],
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    one, other = record["commits"]
    bound = f"relative differences up to {record['tolerance']:g}" if record["tolerance"] else "the same bits"
    lines = [
        f"`{one['commit'][:9]}` ({one['is']}) against `{other['commit'][:9]}` ({other['is']}), "
        f"{record['steps']} steps each, asked for: {bound}. {record['date']}, {record['machine']}.",
        "",
        "| objective | layout | every metric of every step |",
        "| --- | --- | --- |",
        *(f"| {row['objective']} | {row['layout']} | {row['said']} |" for row in record["runs"]),
    ]
    if added := sorted({metric for row in record["runs"] for metric in row["added"]}):
        lines += ["", f"Only the second has: {', '.join(added)}."]
    return "\n".join(lines) + "\n"


def write_golden(objectives: Sequence[str], folder: Path) -> None:
    """Trains each objective on one rank from the working tree; a file each, a line a step."""
    with tempfile.TemporaryDirectory(prefix="asft_golden_") as scratch:
        side = working_tree(Path(scratch) / "tree")
        check_can_train(side)
        asked = Asked(tuple(objectives), ("tp1",), loss_runs.STEPS)
        found = trained(side, asked, Path(scratch) / "runs")
    folder.mkdir(parents=True, exist_ok=True)
    for (objective, _), lines in found.items():
        kept = [{key: line[key] for key in KEPT if line.get(key) is not None} for line in lines]
        (folder / f"{objective}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        print(f"{folder / objective}.jsonl")


def main(words: list[str]) -> int:
    """Compares, or writes golden files. Returns the exit code."""
    options = _parser().parse_args(words)
    try:
        if options.golden:
            write_golden(options.objectives, GOLDEN)
            return 0
        return _compared(options)
    except RefusedError as refused:
        print(f"loss_compare: {refused}", file=sys.stderr)
        return REFUSED


def _compared(options: argparse.Namespace) -> int:
    if options.first is None:
        raise RefusedError("no commit was named: give one to compare this working tree with, or two")
    if options.steps < 1:
        raise RefusedError(f"--steps {options.steps} trains nothing: give 1 or more")
    commits = [commit_of(named) for named in (options.first, options.second) if named is not None]
    asked = Asked(tuple(options.objectives), tuple(options.layouts), options.steps)
    with tempfile.TemporaryDirectory(prefix="asft_compare_") as scratch, contextlib.ExitStack() as trees:
        folder = Path(scratch)
        sides = [
            trees.enter_context(tree_of(commit, folder / f"tree_{n}")) for n, commit in enumerate(commits)
        ]
        if len(sides) == 1:
            sides.append(working_tree(folder / "tree_1"))
        found = compare(sides[0], sides[1], asked, folder)
        record = record_of(sides, asked, found, tolerance=options.tolerance)
    print(table(record))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        (options.out / f"{options.name}.md").write_text(table(record))
    return 0 if record["within"] else BEYOND


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", nargs="?", metavar="A", help="a commit")
    parser.add_argument("second", nargs="?", metavar="B", help="another (default: the working tree)")
    parser.add_argument("--golden", action="store_true", help="write the golden runs instead")
    names, layouts = tuple(loss_runs.OBJECTIVES), ("tp1", "tp2_pp2")
    parser.add_argument(
        "--objectives",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"some of {', '.join(names)}",
    )
    parser.add_argument(
        "--layouts", nargs="+", choices=tuple(loss_runs.LAYOUTS), default=layouts, help="default: tp1 tp2_pp2"
    )
    parser.add_argument("--steps", type=int, default=8, help="of every run (default: %(default)s)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="relative difference allowed; 0, the default, asks for the same bits",
    )
    parser.add_argument("--out", type=Path, help="folder of the record and the table")
    parser.add_argument("--name", default="loss_compare", help="of these files (default: %(default)s)")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # worktrees go with it
    sys.exit(main(sys.argv[1:]))
