"""The alpaca_eval package as judge: its annotator, its reference answers, its length-controlled win rate. It is started as a command."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asft_eval.backends.server import KEY_VARIABLE, without_key
from asft_eval.errors import EvaluationError
from asft_eval.judge import Duel, Judgement, Verdict

COMMAND = "alpaca_eval"
_MODEL = "model"  # its row in the leaderboard that the command writes


class PackageJudge:
    """The command `alpaca_eval`, of this environment or of PATH.

    Args:
        annotators: its annotators_config; None = the package's own.

    Raises:
        EvaluationError: the command is not there.
    """

    def __init__(self, annotators: str | None = None):
        self.name = f"{COMMAND}:{annotators}" if annotators else COMMAND
        self._annotators = annotators
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        command = shutil.which(COMMAND, path=path)
        if command is None:
            raise EvaluationError(
                "the alpaca_eval package is not here: pip install alpaca_eval 'setuptools<81', in an environment of its own whose bin folder is on PATH, "
                "or name a model as the judge"
            )
        self._command = command

    @property
    def identity(self) -> str:
        """Its name: the package knows its own versions."""
        return self.name

    def decide(self, duels: Sequence[Duel], *, outputs: Path) -> Judgement:
        """The verdicts, by way of the files that the command writes into a folder beside the outputs."""
        folder = outputs.with_suffix(f".{COMMAND}")
        self._run(outputs, folder)
        figures = _leaderboard(folder)
        preferences = _preferences(folder)
        found = [preferences.get(duel.instruction) for duel in duels]
        length_controlled = figures.get("length_controlled_winrate")
        return Judgement(
            verdicts=[_verdict(preference) for preference in found],
            unreadable=sum(preference is None for preference in found),
            win_rate=figures["win_rate"] / 100,
            length_controlled_win_rate=None if length_controlled is None else length_controlled / 100,
            remark="answers are compared with the package's reference answers; accuracy is its discrete win rate, ties not won",
        )

    def _run(self, outputs: Path, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        words = [
            self._command,
            "--model_outputs",
            str(outputs),
            "--output_path",
            str(folder),
            "--name",
            _MODEL,
        ]
        words += ["--precomputed_leaderboard", "None", "--is_cache_leaderboard", "False"]
        words += ["--annotators_config", self._annotators] if self._annotators else []
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
            last = without_key(last, os.environ.get(KEY_VARIABLE, "").strip())
            raise EvaluationError(
                f"alpaca_eval ended with exit code {done.returncode} ({last[:300]}): see that its key (OPENAI_API_KEY) is set and its hub files can be "
                "fetched, or name a model as the judge"
            )


def _one(folder: Path, name: str) -> Path:
    found = sorted(folder.rglob(name))
    if len(found) != 1:
        raise EvaluationError(
            f"alpaca_eval wrote {len(found)} files {name} into {folder} instead of one: use alpaca_eval 0.6"
        )
    return found[0]


def _leaderboard(folder: Path) -> dict[str, float]:
    """The numbers of the model's row."""
    with _one(folder, "leaderboard.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("") == _MODEL]
    if len(rows) != 1 or not rows[0].get("win_rate"):
        raise EvaluationError(f"the leaderboard in {folder} has no win rate: use alpaca_eval 0.6")
    found: dict[str, float] = {}
    for key, value in rows[0].items():
        try:
            found[key] = float(value)
        except ValueError:
            continue
    return found


def _preferences(folder: Path) -> dict[str, float | None]:
    """Instruction -> 1 (the reference) to 2 (the model); None where the annotator said nothing readable."""
    rows: list[dict[str, Any]] = json.loads(_one(folder, "annotations.json").read_text(encoding="utf-8"))
    return {row["instruction"]: row.get("preference") for row in rows}


def _verdict(preference: float | None) -> Verdict:
    if preference is None:
        return Verdict(False, "alpaca_eval gives no preference")
    return Verdict(
        preference > 1.5, f"alpaca_eval's preference is {preference:.3f}; above 1.5 the model's answer"
    )
