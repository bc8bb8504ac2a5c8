"""asft report: the curves of training runs as one page."""

from __future__ import annotations

import argparse
import contextlib
from importlib.util import find_spec
from pathlib import Path

from asft_nemo.commands.output import DONE, Add, answer
from asft_nemo.errors import UserError

PAGE = "report.html"


def add_report(add: Add) -> None:
    """Adds the command."""
    report = add(
        "report", _report, "draw the curves of training runs, also of running ones, as one HTML page"
    )
    report.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run.dir of a training run; several are overlaid"
    )
    report.add_argument(
        "--out", type=Path, help=f"the page (default: {PAGE} in RUN; of several runs in the current folder)"
    )


def _report(arguments: argparse.Namespace) -> int:
    if find_spec("matplotlib") is None:
        raise UserError("asft report draws with matplotlib, which is not installed: pip install matplotlib")
    from asft_nemo.reporting.curves import MOST_RUNS
    from asft_nemo.reporting.run_page import last_values, run_page
    from asft_nemo.reporting.runs import read_runs

    folders: list[Path] = arguments.runs
    if len(folders) > MOST_RUNS:
        raise UserError(
            f"{len(folders)} runs are more than one picture can tell apart: give at most {MOST_RUNS}"
        )
    runs = read_runs(folders)
    out = arguments.out or (folders[0] if len(folders) == 1 else Path()) / PAGE
    _write(out, run_page(runs))
    answer(
        arguments,
        {"report": str(out), "runs": [last_values(run) for run in runs]},
        f"report: {out}",
    )
    return DONE


def _write(out: Path, page: str) -> None:
    """Writes the page under its name only once it is whole: a former one stays until then. What is no plain file, as /dev/stdout, takes it as it comes.

    Raises:
        UserError: the system refuses; what was begun is taken away again.
    """
    if out.is_symlink() and out.is_file():
        out = out.resolve()
    replaces = out.is_file() or not out.exists()
    begun = out.with_name(f"{out.name}.unfinished") if replaces else out
    try:
        begun.write_text(page, encoding="utf-8")
        if replaces:
            begun.replace(out)
    except OSError as error:
        if replaces:
            with contextlib.suppress(OSError):
                begun.unlink(missing_ok=True)
        raise UserError(
            f"{out} cannot be written ({error.strerror}): give --out FILE in a folder of yours"
        ) from None
