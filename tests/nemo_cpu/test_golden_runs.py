"""Twenty steps of every objective against golden files: the same loss, gradient norm and KL, step by step, on every machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from kept import some_of
from ranks import RankGroup
from real_runs import metrics

from asft_nemo.config.load import compose
from asft_nemo.config.schema import to_dict
from asft_nemo.objectives import objective_names

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from bench import loss_runs  # noqa: E402
from bench.compared import Difference, difference  # noqa: E402
from loss_compare import GOLDEN  # noqa: E402

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

# Relative to the largest value of a metric in its run. What other kernels change and what a wrong weight does: docs/convergence.md.
TOLERANCE = 5e-4
# The others add the terms of these up in other ways.
SHORT = ("sft", "dft", "asft", "asft_reverse", "iw_sft", "eaft", "psft")
# A weight that is wrong by a hundredth.
WRONG = [
    ("asft", "objective.kl_weight=0.505"),
    ("asft_sft", "objective.alpha=0.101"),
    ("asft_reverse", "objective.kl_weight=0.505"),
    ("sft_kl", "objective.kl_weight=0.505"),
    ("eaft", "objective.exponent=1.01"),
]


@pytest.fixture(scope="module")
def rank1() -> Any:
    """One rank."""
    group = RankGroup(1)
    yield group
    group.close()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loss_runs.write_rows(tmp_path_factory.mktemp("golden") / "rows.jsonl")


def golden(objective: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / f"{objective}.jsonl").read_text().splitlines()]


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def trained(
    group: RankGroup, objective: str, rows: Path, run_dir: Path, *, layout: str = "tp1", wrong: str = ""
) -> Difference:
    """How far a run is from its golden file."""
    words = loss_runs.words_of(objective, layout, steps=loss_runs.STEPS, rows=rows, run_dir=run_dir)
    kept_words = [word for word in words if not wrong or word.split("=")[0] != wrong.split("=")[0]]
    settings = flat(to_dict(compose([*kept_words, *filter(None, [wrong])])))
    group.run("jobs:train_itself", settings=settings)
    expected = golden(objective)
    found = [
        {key: line.get(key) for key in first} for line, first in zip(metrics(run_dir), expected, strict=True)
    ]
    return difference(expected, found)


@pytest.mark.parametrize("objective", some_of(loss_runs.OBJECTIVES, kept=SHORT))
def test_a_run_is_its_golden_file(objective: str, rank1: RankGroup, rows: Path, tmp_path: Path) -> None:
    found = trained(rank1, objective, rows, tmp_path / "run")
    print(f"{objective}: {found.said()}")
    assert found.size <= TOLERANCE, found.said()


@pytest.mark.parametrize("objective", some_of(loss_runs.OBJECTIVES, kept=["asft"]))
def test_so_is_one_on_two_ranks(objective: str, ranks2: RankGroup, rows: Path, tmp_path: Path) -> None:
    found = trained(ranks2, objective, rows, tmp_path / "run", layout="tp2")
    print(f"{objective} at TP2: {found.said()}")
    assert found.size <= TOLERANCE, found.said()


@pytest.mark.parametrize(("objective", "wrong"), some_of(WRONG, kept=["asft-objective.kl_weight=0.505"]))
def test_a_weight_that_is_wrong_by_a_hundredth_is_seen(
    objective: str, wrong: str, rank1: RankGroup, rows: Path, tmp_path: Path
) -> None:
    found = trained(rank1, objective, rows, tmp_path / "run", wrong=wrong)
    print(f"{wrong}: {found.said()}")
    assert found.size > 5 * TOLERANCE, found.said()


def test_every_objective_and_direction_has_a_file() -> None:
    assert {file.stem for file in GOLDEN.glob("*.jsonl")} == set(loss_runs.OBJECTIVES)
    assert {name.removesuffix("_reverse") for name in loss_runs.OBJECTIVES} == set(objective_names())
    for name in loss_runs.OBJECTIVES:
        lines = golden(name)
        assert [line["step"] for line in lines] == list(range(1, loss_runs.STEPS + 1))
        assert all({"loss", "nll", "grad_norm", "token_weight"} <= set(line) for line in lines)
    assert all("kl" in line for line in golden("asft"))
    assert all("kl_reverse" in line for line in golden("asft_reverse"))
