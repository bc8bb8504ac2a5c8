"""Pairs of everything that a step can be: every case of the exactness matrix against fp64, and every pair of levels in some case."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from exactness_case import Measured, make_models, measure
from exactness_factors import (
    Case,
    all_pairs,
    committed_cases,
    is_possible,
    name_of,
    pairs_of,
    refusal,
    world_size,
)
from exactness_faults import FAULTS
from exactness_page import BEGIN, END, PAGE, record_of, table, with_table
from gradients import BOUND
from kept import some_of
from ranks import RankGroup

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import exactness_matrix  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
KEPT = 11  # the first cases bring three quarters of all pairs


@pytest.mark.parametrize("wrong", ["error", "of_largest", "loss"])
def test_a_case_is_exact_where_every_number_is_one_and_small(wrong: str) -> None:
    good = {"error": 1e-7, "of_largest": 1e-7, "loss": 1e-7}
    for value, exact in ((1e-7, True), (2 * BOUND, False), (float("nan"), False)):
        assert Measured(**{**good, wrong: value}, tensor="x", tensors=1, seconds=1.0).exact is exact


def test_the_page_shows_the_record() -> None:
    """Every case as it is now, every number of it, within the bound; the sums are those of the rows."""
    record = json.loads((RESULTS / "exactness.json").read_text())
    assert [row["case"] for row in record["cases"]] == committed_cases()
    assert record["exact"]
    assert record | record_of(record["cases"]) == record
    assert (RESULTS / "exactness.md").read_text() == table(record) + "\n"
    assert with_table(PAGE.read_text(), record) == PAGE.read_text()


@pytest.mark.usefixtures("keep_logging_and_warnings")
def test_the_tool_goes_on_and_writes_when_all_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is measured here: what is left is said, and the table is that of the rows in its file."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(exactness_matrix, "PAGE", page)
    lines = [json.dumps(row) for row in json.loads((RESULTS / "exactness.json").read_text())["cases"]]
    call = ["--work", str(tmp_path), "--out", str(tmp_path / "out"), "--seconds", "-1"]
    (tmp_path / "cases.jsonl").write_text("\n".join(lines[1:]) + "\n")
    assert exactness_matrix.main(call) == exactness_matrix.LEFT
    assert not (tmp_path / "out").exists()
    with (tmp_path / "cases.jsonl").open("a") as file:
        file.write(json.dumps({**json.loads(lines[0]), "error": 0.5}) + "\n")
    assert exactness_matrix.main(call) == 1
    written = json.loads((tmp_path / "out" / "exactness.json").read_text())
    assert written["worst"]["error"] == {"case": 0, "error": 0.5}
    assert page.read_text() == f"before\n{BEGIN}\n{table(written)}\n{END}\nafter\n"


@pytest.fixture(scope="module")
def ranks1() -> Iterator[RankGroup]:
    """One rank by itself."""
    group = RankGroup(1)
    yield group
    group.close()


@pytest.fixture(scope="module")
def matrix_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


def test_every_case_runs_and_every_pair_is_in_one() -> None:
    """What the rules refuse is in no case, and a pair that is in none cannot be in any."""
    cases = committed_cases()
    assert [(name_of(case), said) for case in cases if (said := refusal(case)) is not None] == []
    covered = set().union(*map(pairs_of, cases))
    left_out = [pair for pair in all_pairs() if pair not in covered]
    assert [pair for pair in left_out if is_possible(pair)] == []
    assert len(covered) > 20 * len(left_out)


@pytest.mark.nemo
@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{number}", marks=() if number < KEPT else pytest.mark.long)
        for number, case in enumerate(committed_cases())
    ],
)
def test_gradients_equal_the_oracle(
    case: Case, matrix_models: dict[str, Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Every parameter's gradient and the loss of a real step."""
    group: RankGroup = request.getfixturevalue(f"ranks{world_size(case)}")
    found = measure(case, group, matrix_models, tmp_path / "case")
    print(f"{name_of(case)}: {found}")
    assert found.exact, (name_of(case), found, BOUND)


@pytest.mark.nemo
@pytest.mark.multiproc
@pytest.mark.slow
@pytest.mark.parametrize("fault", some_of(FAULTS, kept=["packed examples see each other"]))
def test_a_mistake_shows(
    fault: str, matrix_models: dict[str, Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """What the matrix is for: a case that is exact is far from it with the mistake."""
    case = FAULTS[fault].case()
    group: RankGroup = request.getfixturevalue(f"ranks{world_size(case)}")
    found = measure(case, group, matrix_models, tmp_path / "case", fault=fault)
    print(f"{fault}: {name_of(case)}: {found}")
    assert found.error > 100 * BOUND
