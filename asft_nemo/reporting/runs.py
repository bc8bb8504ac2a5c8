"""What a run's folder says of the run, also while it goes on: metrics, starts, alarms, settings."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asft_nemo.errors import UserError
from asft_nemo.run_dir import ALARMS, STARTS

Line = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """One run as its files tell it.

    Attributes:
        name: shown; different from the other runs' names.
        folder: its folder.
        record: run.json.
        steps: lines of metrics.jsonl, by step, at least one.
        starts: of starts.jsonl, the first of which began the run; empty for runs from before there was one.
        alarms: of alarms.jsonl.
    """

    name: str
    folder: Path
    record: Line
    steps: tuple[Line, ...]
    starts: tuple[Line, ...]
    alarms: tuple[Line, ...]

    @property
    def resumed_after(self) -> list[int]:
        """The steps behind which the run was resumed and that are still in it, ascending."""
        last = self.steps[-1]["step"]
        return sorted({start["step"] for start in self.starts if 0 < start["step"] <= last})

    @property
    def max_steps(self) -> int | None:
        """Steps of the whole run, where they are known."""
        if self.starts:
            return int(self.starts[-1]["max_steps"])
        return self.record["config"]["trainer"].get("max_steps")


def read_runs(folders: Sequence[Path]) -> list[RunFiles]:
    """The runs in these folders, with names that tell them apart.

    Raises:
        UserError: a folder holds no run, one without a step, or one that may not be read.
    """
    repeated = {
        str(folder) for folder in folders if [f.resolve() for f in folders].count(folder.resolve()) > 1
    }
    if repeated:
        raise UserError(f"{min(repeated)} is given twice: name each run once")
    try:
        return [
            _read_run(folder, name) for folder, name in zip(folders, distinct_names(folders), strict=True)
        ]
    except PermissionError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}): ask its owner to let you read it"
        ) from None


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(len(one) for one in parts) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read_run(folder: Path, name: str) -> RunFiles:
    record = folder / "run.json"
    if not record.is_file():
        raise UserError(_no_run(folder))
    steps = _lines(folder / "metrics.jsonl", "seconds", "tokens")
    if not steps:
        raise UserError(f"the run in {folder} has no step yet: call asft report again when it has")
    return RunFiles(
        name=name,
        folder=folder,
        record=_record(record),
        steps=tuple(sorted(steps, key=lambda line: line["step"])),
        starts=_lines(folder / STARTS, "max_steps", "time", "host"),
        alarms=_lines(folder / ALARMS),
    )


def _record(path: Path) -> Line:
    """run.json, whose settings are what the page shows."""
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): is this the folder of a run?") from None
    if not (
        isinstance(record, dict) and isinstance(record.get("config"), dict) and "trainer" in record["config"]
    ):
        raise UserError(f"{path} holds no settings of a run: give the run.dir of a training run of asft")
    return record


def _lines(path: Path, *keys: str) -> tuple[Line, ...]:
    """The whole lines of a run's file, all of which have these keys.

    Raises:
        UserError: it is another program's.
    """
    lines = read_lines(path)
    for line in lines:
        missing = [key for key in keys if key not in line]
        if missing:
            raise UserError(
                f"{path} has no {missing[0]} at step {line['step']}: give the run.dir of a training run of asft"
            )
    return tuple(lines)


def read_lines(path: Path) -> list[Line]:
    """The objects of a file that a run may be writing: a last line without its end is left out.

    Raises:
        UserError: another line is none that a run writes.
    """
    lines: list[Line] = []
    if not os.path.lexists(path):
        return lines
    *texts, _ = path.read_text(errors="replace").split("\n")
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        else:
            raise UserError(
                f"{path} is damaged in line {number} of {len(texts)}: restore it, or remove that line"
            )
    return lines


def _no_run(folder: Path) -> str:
    """The sentence for a folder without a run, with the nearest there is."""
    if folder.is_dir():
        inside = _runs_in(folder)
        if inside:
            return f"{folder} is no run but holds {len(inside)}: give one of {_listed(inside)}"
    around = _runs_in(folder.parent)
    by_name = {place.name: place for place in around}
    near = difflib.get_close_matches(folder.name, by_name, n=1)
    if folder.is_file():
        return f"{folder} is a file: give the run.dir of a training run, its folder"
    what = f"{folder} {'holds no run.json, so it is no run' if folder.is_dir() else 'does not exist'}"
    if near:
        return f"{what}: did you mean {by_name[near[0]]}?"
    if around:
        return f"{what}: runs beside it are {_listed(around)}"
    return f"{what}: give the run.dir of a training run"


def _runs_in(folder: Path) -> list[Path]:
    return sorted(place.parent for place in folder.glob("*/run.json")) if folder.is_dir() else []


def _listed(folders: Sequence[Path], most: int = 5) -> str:
    shown = ", ".join(str(folder) for folder in folders[:most])
    return shown if len(folders) <= most else f"{shown} and {len(folders) - most} more"
