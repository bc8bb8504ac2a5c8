"""asft compare: results side by side as markdown, JSON, and a page with pictures."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from asft_nemo.commands.evaluation import evaluation_errors
from asft_nemo.commands.output import DONE, Add, answer
from asft_nemo.errors import UserError

if TYPE_CHECKING:
    from asft_eval.compare import Comparison

    from asft_nemo.reporting.runs import RunFiles

PAGE, TABLE, VALUES = "comparison.html", "comparison.md", "comparison.json"


def add_comparison(add: Add) -> None:
    """Adds the command."""
    compare = add("compare", _compare, "put results side by side")
    compare.add_argument(
        "results",
        nargs="+",
        metavar="NAME=RESULT_DIR",
        help="folders of asft eval; the first is the one that the others are compared with",
    )
    compare.add_argument("--out", type=Path, required=True, help=f"folder for {TABLE}, {VALUES} and {PAGE}")
    compare.add_argument(
        "--run",
        action="append",
        default=[],
        metavar="NAME=RUN_DIR",
        help="run.dir of the training that made NAME, for curves of the training; may be given several times",
    )
    compare.add_argument(
        "--force",
        action="store_true",
        help="compare although they were not measured alike; all three files say so",
    )


def _compare(arguments: argparse.Namespace) -> int:
    results = _named(arguments.results, "RESULT_DIR")
    runs = _runs(_named(arguments.run, "RUN_DIR"), results)
    with evaluation_errors():
        from asft_eval.compare import compare
        from asft_eval.told import told

        comparison = compare(results, force=arguments.force)
        examples = told(comparison, results)
    values = {**comparison.to_json(), "examples": [dataclasses.asdict(one) for one in examples]}
    from asft_nemo.reporting.comparison_page import comparison_page

    pictures, lacking = _pictures(comparison, runs)
    table = markdown(comparison)
    contents = {
        TABLE: table,
        VALUES: json.dumps(values, indent=2) + "\n",
        PAGE: comparison_page(comparison, examples, pictures, lacking),
    }
    out: Path = arguments.out
    _write(out, contents)
    warnings = [f"warning: {text}" for text in comparison.warnings]
    answer(arguments, values, "\n".join([*warnings, table, f"page: {out / PAGE}"]))
    return DONE


def _write(out: Path, contents: Mapping[str, str]) -> None:
    """Writes the files so that they always tell of one comparison: none of them under its name before all are written.

    Raises:
        UserError: the system refuses; what was begun is taken away again.
    """
    begun = [out / f"{name}.unfinished" for name in contents]
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, content in zip(begun, contents.values(), strict=True):
            path.write_text(content, encoding="utf-8")
        for path, name in zip(begun, contents, strict=True):
            path.replace(out / name)
    except OSError as error:
        with contextlib.suppress(OSError):
            for path in begun:
                path.unlink(missing_ok=True)
            if made:
                out.rmdir()
        raise UserError(f"{out} cannot be written ({error.strerror}): give --out a folder of yours") from None


def _named(words: Sequence[str], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or not name or not folder or name in found:
            raise UserError(f"cannot use '{word}': write NAME={what}, each name once")
        found[name] = folder
    return found


def _runs(folders: Mapping[str, str], results: Mapping[str, str]) -> dict[str, RunFiles]:
    """Name -> the run; several names may have one run, e.g. its best and its latest checkpoint. Each folder is read once."""
    from asft_nemo.reporting.runs import read_runs

    for name in folders:
        if name not in results:
            raise UserError(f"--run {name} has no result of that name: use some of {', '.join(results)}")
    if not folders:
        return {}
    places = {name: Path(folder).resolve() for name, folder in folders.items()}
    first = {place: Path(folders[name]) for name, place in reversed(places.items())}  # as the user wrote it
    runs = dict(zip(first, read_runs(list(first.values())), strict=True))
    return {name: dataclasses.replace(runs[place], name=name) for name, place in places.items()}


def _pictures(
    comparison: Comparison, runs: Mapping[str, RunFiles]
) -> tuple[Mapping[str, Sequence[tuple[str, str]]], str]:
    """The pictures, and why some or all are missing. An image for evaluation may have no matplotlib; its comparison is whole without."""
    if find_spec("matplotlib") is None:
        return (
            {},
            "No pictures: matplotlib is not installed here (pip install matplotlib, then compare again).",
        )
    from asft_nemo.reporting.comparison_pictures import all_pictures
    from asft_nemo.reporting.curves import MOST_RUNS

    names = list(comparison.results)
    lacking = f"Pictures show the first {MOST_RUNS} models only." if len(names) > MOST_RUNS else ""
    return all_pictures(comparison, runs), lacking


def markdown(comparison: Comparison) -> str:
    """`comparison.md`: scores, drift, what the marks mean, what was left out or forced."""
    from asft_eval.compare import markdown_table
    from asft_eval.drift_figures import drift_table

    header, rows = comparison.table()
    first = next(iter(comparison.results))
    parts = [f"Not measured alike, compared by force: {text}.\n" for text in comparison.warnings]
    if comparison.suites:
        meaning = (
            "Right answers in per cent [95 % bootstrap interval over examples; Wilson's where all score alike]. "
            f"▲ ▼: better or worse than {first}, paired, corrected by Holm.\n"
        )
        parts += [markdown_table(header, rows), meaning]
    calibrations = comparison.calibration_table()
    if calibrations is not None:
        parts += [
            markdown_table(*calibrations),
            "Expected calibration error of multiple choice: how far the chosen letter's probability among the letters is from how often it is right.\n",
        ]
    drift = drift_table(comparison.results)
    if drift is not None:
        parts += [
            markdown_table(*drift),
            "On held-out text, in nats per token [95 % bootstrap interval over texts].\n",
        ]
    if comparison.left_out:
        parts.append(f"Left out, because some result lacks them: {', '.join(comparison.left_out)}.\n")
    return "\n".join(parts)
