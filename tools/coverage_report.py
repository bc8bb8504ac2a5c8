"""Which lines and branches of objectives, losses, checkpoint, data and planner no test of theirs runs, and why not.

    python tools/coverage_report.py --out benchmarks/results [--work runs/coverage] [--again]

Runs the unit tests of these packages and the losses on four gloo ranks under coverage.py, started and forked processes counted, and writes
`coverage.json` and `coverage.md`: a table by package, and every line that was not run with the reason that tools/coverage_reasons.json gives. What was
measured stays in `--work`; `--again` only writes the table from it. Exit code 1 where a package has less than 95 % of its branches or a line no
reason, 2 where tests fail or these packages are no longer what was measured. Ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from bench import digests

ROOT = Path(__file__).resolve().parents[1]
REASONS = ROOT / "tools" / "coverage_reasons.json"
PACKAGES = ("objectives", "losses", "checkpoint", "data", "planner")
TESTS = (*(f"tests/unit/{package}" for package in PACKAGES), "tests/multiproc")
BAR = 95.0
# Python's own tracer sees no threads of other cores' making, and 3.11 has no monitoring: C's tracer.
SETTINGS = """
[run]
branch = true
parallel = true
concurrency = multiprocessing, thread
patch = subprocess, _exit, fork
core = ctrace
source = {source}
data_file = {data}
[paths]
tree = {source}
"""


def measure(work: Path) -> int:
    """Runs the tests under coverage.py; pytest's exit code."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    digests.keep(work, sources())
    settings = work / "coverage.ini"
    settings.write_text(SETTINGS.format(source=ROOT / "asft_nemo", data=work / "data"))
    command = [
        sys.executable,
        "-m",
        "coverage",
        "run",
        f"--rcfile={settings}",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *TESTS,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'eval'}"}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def sources() -> dict[str, str]:
    """Digests of the modules that are measured."""
    files = (file for package in PACKAGES for file in (ROOT / "asft_nemo" / package).rglob("*.py"))
    return digests.digests(ROOT, (str(file.relative_to(ROOT)) for file in files))


def refusal(work: Path) -> str | None:
    """Says that what `work` holds is not of this code; None where it is."""
    measured = digests.kept(work)
    if measured is None:
        return f"{work} does not say of which code it is: measure again, without --again"
    others = digests.differing(measured, sources())
    return (
        f"{', '.join(others)} changed since {work} was begun: measure again, without --again"
        if others
        else None
    )


def combined(work: Path) -> dict[str, Any]:
    """What coverage.py says of each file, relative to the repository."""
    settings, record = work / "coverage.ini", work / "report.json"
    coverage = [sys.executable, "-m", "coverage"]
    if list(work.glob("data.*")):
        subprocess.run([*coverage, "combine", "-q", "--keep", f"--rcfile={settings}"], cwd=work, check=True)
    include = ",".join(f"{ROOT}/asft_nemo/{package}/*" for package in PACKAGES)
    subprocess.run(
        [*coverage, "json", "-q", f"--rcfile={settings}", f"--include={include}", "-o", str(record)],
        cwd=ROOT,
        check=True,
    )
    return json.loads(record.read_text())["files"]


def gaps(file: str, found: dict[str, Any], reasons: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    """Runs of lines that were not run, and branches that were never taken from lines that were; each with its first line's text and its reason."""
    text = (ROOT / file).read_text().splitlines()
    missing = sorted(found["missing_lines"])
    starts = [(line, "not run") for line in missing if not _follows(line, set(missing), text)]
    starts += [
        (source, "never leaves the function from here" if target < 0 else f"never goes on at line {target}")
        for source, target in found["missing_branches"]
        if source not in missing
    ]
    return [
        {
            "line": line,
            "what": what,
            "code": text[line - 1].strip(),
            "why": reasons.get(file, {}).get(text[line - 1].strip()),
        }
        for line, what in sorted(starts)
    ]


def _follows(line: int, missing: set[int], text: list[str]) -> bool:
    """Whether a line belongs to a run of missing lines that began above it: only blank lines and remarks lie between."""
    above = line - 1
    while (
        above > 0
        and above not in missing
        and (not text[above - 1].strip() or text[above - 1].strip().startswith("#"))
    ):
        above -= 1
    return above in missing


def record_of(files: dict[str, Any], reasons: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Sums by package, and every gap."""
    from asft_nemo.run_dir import git_commit, versions

    packages = {}
    for package in PACKAGES:
        rows = [row["summary"] for name, row in files.items() if name.startswith(f"asft_nemo/{package}/")]
        total = {
            key: sum(row[key] for row in rows)
            for key in ("num_statements", "covered_lines", "num_branches", "covered_branches")
        }
        packages[package] = total | {
            "lines": 100 * total["covered_lines"] / total["num_statements"],
            "branches": 100 * total["covered_branches"] / total["num_branches"],
        }
    return {
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "versions": versions(),
        "machine": platform.platform(),
        "tests": list(TESTS),
        "bar": BAR,
        "packages": packages,
        "gaps": {name: found for name, row in sorted(files.items()) if (found := gaps(name, row, reasons))},
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    commit = str(record["commit"])
    lines = [
        # and that the tree differed from it
        f"{record['date']}, commit `{commit[:9]}{commit[40:]}`, {record['machine']}: `{'`, `'.join(record['tests'])}`.",
        "",
        "| package | statements | run | branches | taken |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in record["packages"].items():
        lines.append(
            f"| {name} | {row['num_statements']} | {row['lines']:.1f} % | {row['num_branches']} | {row['branches']:.1f} % |"
        )
    for name, rows in record["gaps"].items():
        lines += ["", f"`{name}`", "", "| line | | not seen | why |", "| --- | --- | --- | --- |"]
        for row in rows:
            code = row["code"].replace("|", "\\|")
            lines.append(
                f"| {row['line']} | `{code}` | {row['what']} | {row['why'] or '**no reason given**'} |"
            )
    return "\n".join(lines) + "\n"


def passes(record: dict[str, Any]) -> bool:
    """Whether every package has its share of branches, and every gap a reason."""
    argued = all(row["why"] for rows in record["gaps"].values() for row in rows)
    return argued and all(row["branches"] >= BAR for row in record["packages"].values())


def main(words: list[str]) -> int:
    """Measures and writes. Returns the exit code."""
    options = _parser().parse_args(words)
    work = options.work.resolve()
    if not options.again and (code := measure(work)):
        print(f"coverage_report: the tests end with code {code}: mend them first", file=sys.stderr)
        return 2
    if (refused := refusal(work)) is not None:
        print(f"coverage_report: {refused}", file=sys.stderr)
        return 2
    record = record_of(combined(work), json.loads(REASONS.read_text()))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "coverage.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "coverage.md").write_text(table(record))
    print(table(record))
    return 0 if passes(record) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of coverage.json and coverage.md")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/coverage"), help="what was measured (default: %(default)s)"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure nothing, write the table from what is there"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
