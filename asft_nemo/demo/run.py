"""`asft demo`: import, fine-tune with every objective, export, measure, report. All real, on this machine."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from asft_nemo.config.schema import RunConfig
from asft_nemo.demo import folder, plan, skills
from asft_nemo.demo.plan import FULL, QUICK, Entry, Plan
from asft_nemo.demo.stages import Stages, duration, watched
from asft_nemo.errors import UserError

logger = logging.getLogger(__name__)

RUN_BYTES = 45_000_000  # of one run: checkpoint with optimizer state, exported model, figures
QUIET = ("asft_eval", "asft_nemo.data", "asft_nemo.checkpoint", "asft_nemo.launch_local")
"""Loggers that would say the same for every one of the runs; warnings still come through."""


def main(quick: bool, out_dir: Path) -> Path:
    """Runs the demo and writes `out_dir/report.html` and `out_dir/report.json`.

    Args:
        quick: two objectives, one seed, few steps: shows that everything works, proves nothing.
        out_dir: a new or empty folder, or that of a former demo, which is replaced.

    Returns:
        The page.

    Raises:
        UserError: the folder cannot be used, or something is missing on this machine.
    """
    chosen = QUICK if quick else FULL
    if find_spec("matplotlib") is None:
        raise UserError("asft demo draws with matplotlib, which is not installed: pip install matplotlib")
    entries = plan.entries(chosen)
    stages = Stages(expected_seconds(chosen))
    logger.info(
        "asft demo: %s, %d training runs of %d steps on %d ranks; about %s on two quiet cores",
        ", ".join(chosen.objectives),
        len(entries),
        chosen.steps,
        plan.TP_SIZE * plan.PP_SIZE,
        duration(stages.left()),
    )
    with folder.opened(out_dir, needed_bytes=RUN_BYTES * (len(entries) + 1)) as where, _quiet():
        page = _Demo(chosen, entries, stages, where, quick=quick).run()
    return page


def expected_seconds(chosen: Plan) -> dict[str, float]:
    """Seconds of every stage on a quiet machine with two cores."""
    runs = len(plan.entries(chosen))
    tests = chosen.new_tests + chosen.old_tests * len(skills.OLD_SKILLS)
    return {
        "data": 1,
        "import": 2,
        "train": 30 + runs * (5 + 0.25 * chosen.steps),
        "export": 0.3 * (runs + 1),
        "measure": 5 + (runs + 1) * (0.5 + 0.0015 * tests + 0.1 * chosen.text_blocks),
        "report": 2,
    }


class _Demo:
    """One demo in an open folder; `run` does the stages in order."""

    def __init__(self, chosen: Plan, entries: list[Entry], stages: Stages, where: Path, *, quick: bool):
        self.plan, self.entries, self.stages, self.where, self.quick = chosen, entries, stages, where, quick
        self.started = datetime.now(timezone.utc)

    def run(self) -> Path:
        from asft_nemo.config.paths import project_dir

        source = project_dir() / "assets" / "tiny-base"
        with self.stages("data", "writing training examples, tests and held-out text"):
            plan.write_data(self.plan, self.where / "data")
        with self.stages("import", "importing the base model to a NeMo checkpoint"):
            round_trip = self._import(source)
        with self.stages(
            "train", f"fine-tuning: {len(self.entries)} runs, one after another, in one group of ranks"
        ):
            runs = self._train()
        with self.stages("export", "exporting every run to Hugging Face format"):
            self._export()
        with self.stages("measure", "measuring skills and drift of every model"):
            groups = self._measure()
        with self.stages("report", "drawing the report"):
            values, pictures = self._report(groups, runs, round_trip)
        from asft_nemo.demo.page import page

        values["seconds"] = self.stages.seconds
        return folder.write_report(self.where, page=page(values, pictures), values=values)

    def _import(self, source: Path) -> dict[str, Any]:
        """Imports the base, exports it again, and compares both with the original bit for bit."""
        from asft_nemo.checkpoint import export_hf, import_hf, verify

        report = import_hf(source, self.where / "base")
        export_hf(self.where / "base", self.where / "models" / "base")
        there = verify(self.where / "base", source)
        back = verify(self.where / "base", self.where / "models" / "base")
        if not (there.identical and back.identical):
            raise RuntimeError("the base model did not come back from the NeMo checkpoint as it went in")
        return {
            "identical": True,
            "tensors": report.num_tensors,
            "bytes": back.nbytes,
            "exported_runs_identical": None,
        }

    def _train(self) -> list[RunConfig]:
        from asft_nemo.config.load import compose
        from asft_nemo.launch_local import launch_many

        runs = [compose(self._words(entry)) for entry in self.entries]
        metrics = {entry.name: self.where / "runs" / entry.name / "metrics.jsonl" for entry in self.entries}
        with watched(metrics, steps=self.plan.steps):
            launch_many(runs)
        return runs

    def _words(self, entry: Entry, *, start: Path | None = None) -> list[str]:
        where = self.where if start is None else start
        return plan.words(
            self.plan,
            entry,
            model=where / "base",
            data=plan.training_file(where / "data", entry.seed),
            run_dir=where / "runs" / entry.name,
        )

    def _export(self) -> None:
        """Exports the latest checkpoint of every run and checks the written weights against it."""
        from asft_nemo.checkpoint import export_hf, verify

        for entry in self.entries:
            latest = self.where / "runs" / entry.name / "checkpoints" / "latest"
            target = self.where / "models" / entry.name
            export_hf(latest, target)
            if not verify(latest, target).identical:
                raise RuntimeError(f"the export of {entry.name} differs from its checkpoint")

    def _measure(self) -> dict[str, Any]:
        """Every model's scores and drift, grouped by objective, the base first."""
        from asft_nemo.demo.figures import Group
        from asft_nemo.demo.measure import measure

        suites, blocks = plan.suites(self.plan), plan.held_out_blocks(self.plan)
        models, measured = self.where / "models", {}
        for name in _progress(["base", *(entry.name for entry in self.entries)], "measuring"):
            measured[name] = measure(
                models / name,
                models / "base",
                suites=suites,
                blocks=blocks,
                max_tokens=plan.MAX_NEW_TOKENS,
                out_dir=self.where / "evaluation" / name,
            )
            self._say(name, measured[name])
        old = tuple(suite.name for suite in suites if suite.name != skills.NEW_SKILL)
        members = {"base": ["base"]}
        for objective in self.plan.objectives:
            members[objective] = [entry.name for entry in self.entries if entry.objective == objective]
        return {
            objective: Group(objective, tuple(measured[name] for name in names), skills.NEW_SKILL, old)
            for objective, names in members.items()
        }

    def _say(self, name: str, measured: Any) -> None:
        shares = {suite: 100 * sum(scores) / len(scores) for suite, scores in measured.scores.items()}
        old = [share for suite, share in shares.items() if suite != skills.NEW_SKILL]
        new = shares[skills.NEW_SKILL]
        kl = sum(block.forward_kl * block.num_tokens for block in measured.drift)
        kl /= sum(block.num_tokens for block in measured.drift)
        text = (
            f"{name}: new skill {new:.1f} %, old skills {sum(old) / len(old):.1f} %, KL to the base {kl:.3f}"
        )
        with _above_the_bar():
            logger.info("%s", text)

    def _report(
        self, groups: Mapping[str, Any], runs: Sequence[RunConfig], round_trip: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        from asft_nemo.demo import plots, report
        from asft_nemo.demo.verdict import judge
        from asft_nemo.run_dir import git_commit, versions

        metrics = self._metrics()
        verdict = judge(groups)
        first = {entry.objective: entry for entry in reversed(self.entries)}
        words = {o: self._words(first[o], start=Path()) for o in self.plan.objectives}
        round_trip["exported_runs_identical"] = len(self.entries)
        values = {
            "format": report.FORMAT,
            "quick": self.quick,
            "started": self.started.isoformat(timespec="seconds"),
            **report.measurements(groups, verdict),
            "training": report.training(metrics),
            "round_trip": round_trip,
            "protocol": report.protocol(self.plan, runs[0], words),
            "machine": report.machine(),
            "versions": versions(),
            "git_commit": git_commit(),
        }
        pictures = {"trade_off": plots.trade_off(groups)}
        for key, (title, unit, log) in PICTURES.items():
            found = report.series(metrics, key)
            pictures[key] = plots.dynamics(title, unit, found, name=key.replace("_", ""), log=log)
        return values, pictures

    def _metrics(self) -> dict[str, list[list[dict[str, Any]]]]:
        found: dict[str, list[list[dict[str, Any]]]] = {objective: [] for objective in self.plan.objectives}
        for entry in self.entries:
            lines = (self.where / "runs" / entry.name / "metrics.jsonl").read_text().splitlines()
            found[entry.objective].append([json.loads(line) for line in lines])
        return found


PICTURES = {
    "nll": ("Negative log likelihood", "nats per token", False),
    "weighted_nll": ("Weighted negative log likelihood", "nats per token, log scale", True),
    "kl": ("KL(ref||policy) on training tokens", "nats per token", False),
    "token_weight": ("Mean token weight", "weight", False),
}
"""Metric -> title, unit, whether its axis is logarithmic."""


def _progress(items: list[str], what: str) -> Iterator[str]:
    """The items with a bar on a terminal; elsewhere the caller's lines do."""
    return iter(tqdm(items, desc=what, unit="model", disable=not sys.stderr.isatty(), leave=False))


@contextmanager
def _above_the_bar() -> Iterator[None]:
    """Lines written in the block do not tear the bar."""
    with tqdm.external_write_mode(file=sys.stderr):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps loggers that repeat themselves to warnings."""
    before = {name: logging.getLogger(name).level for name in QUIET}
    for name in before:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
