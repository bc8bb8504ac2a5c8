"""Measures every case of the exactness matrix and writes the table: benchmarks/results/exactness.{json,md} and docs/exactness.md.

    python tools/exactness_matrix.py [--seconds 480] [--again] [--cases]

A case is two steps of a real run on gloo ranks; the second one's gradients and loss are compared with one process in fp64
(tests/nemo_cpu/exactness_case.py). What is measured is kept in `--work`, case by case: stopped after `--seconds` or killed, the same command
goes on, and writes the table when the last case is there. `--again` measures from the start. `--cases` makes the cases anew, which is due
when factors or rules change. Exit code 1 where a case is not exact, 3 where cases are left.
"""

# pyright: reportMissingImports=false
# the modules of tests/nemo_cpu, which the path below leads to

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "nemo_cpu")]

from exactness_factors import CASES_FILE, RANKS, Case, committed_cases, name_of, world_size  # noqa: E402
from exactness_page import PAGE, record_of, table, with_table  # noqa: E402

log = logging.getLogger("exactness_matrix")

LEFT = 3  # exit code


def key_of(case: Case) -> str:
    return json.dumps(case)


def measured_before(file: Path) -> dict[str, dict[str, Any]]:
    """What an earlier call has measured, by case."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {key_of(row["case"]): row for row in map(json.loads, lines)}


def measure_all(cases: list[Case], file: Path, *, seconds: float) -> dict[str, dict[str, Any]]:
    """Measures what is missing, cases of as many ranks together, until the time is up; a line of `file` each."""
    from dataclasses import asdict

    from exactness_case import make_models, measure
    from ranks import RankGroup

    from asft_nemo.run_dir import git_commit

    began, found = time.monotonic(), measured_before(file)
    if all(key_of(case) in found for case in cases):
        return found
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="asft_exactness_") as scratch:
        models = make_models(Path(scratch) / "models")
        for size in range(RANKS, 0, -1):
            left = [case for case in cases if world_size(case) == size and key_of(case) not in found]
            group = RankGroup(size)
            try:
                for case in left:
                    if time.monotonic() - began > seconds:
                        return found
                    result = asdict(measure(case, group, models, Path(scratch) / "case"))
                    row = {"case": case, "ranks": size, "commit": git_commit(), **result}
                    with file.open("a") as lines:
                        lines.write(json.dumps(row) + "\n")
                    found[key_of(case)] = row
                    log.info("%d of %d: %s: %.1e", len(found), len(cases), name_of(case), result["error"])
            finally:
                group.close()
    return found


def write(rows: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    """The record and its table, in `out` and on the page."""
    from asft_nemo.run_dir import versions

    record = {
        "date": date.today().isoformat(),
        "commits": sorted({row["commit"] for row in rows}),
        "versions": versions(),
        "machine": platform.platform(),
        **record_of(rows),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "exactness.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "exactness.md").write_text(f"{table(record)}\n")
    if PAGE.exists():
        PAGE.write_text(with_table(PAGE.read_text(), record))
    return record


def main(arguments: list[str]) -> int:
    """Measures and writes. Returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if options.cases:
        from exactness_covering import covering_cases

        lines = ",\n".join(json.dumps(case) for case in covering_cases())
        CASES_FILE.write_text(f"[\n{lines}\n]\n")
    cases, file = committed_cases(), options.work / "cases.jsonl"
    if options.again:
        file.unlink(missing_ok=True)
    found = measure_all(cases, file, seconds=options.seconds)
    if left := [case for case in cases if key_of(case) not in found]:
        log.info("%d of %d cases are left: the same command goes on", len(left), len(cases))
        return LEFT
    record = write([found[key_of(case)] for case in cases], options.out)
    log.info("%s", record["worst"])
    return 0 if record["exact"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so long")
    parser.add_argument("--again", action="store_true", help="forget what has been measured")
    parser.add_argument("--cases", action="store_true", help="make the cases anew")
    parser.add_argument("--work", type=Path, default=Path("runs/exactness"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
