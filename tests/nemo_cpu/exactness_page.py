"""The exactness matrix as a record and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exactness_factors import DEFAULTS, FACTORS, RANKS, all_pairs, pairs_of
from gradients import BOUND

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exactness.md"
BEGIN, END = "<!-- written by tools/exactness_matrix.py -->", "<!-- end -->"
_NUMBERS = ("error", "of_largest", "loss")


def record_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is known of all cases together.

    Args:
        rows: of all cases: `case`, `ranks` and the fields of `exactness_case.Measured`.
    """
    covered = set().union(*(pairs_of(row["case"]) for row in rows))
    pairs = all_pairs()
    worst = {name: max(rows, key=lambda row: row[name]) for name in _NUMBERS}
    return {
        "bound": BOUND,
        "exact": all(row[name] <= BOUND for row in rows for name in _NUMBERS),
        "pairs": {
            "all": len(pairs),
            "in a case": len(covered),
            "refused": [list(map(list, pair)) for pair in pairs if pair not in covered],
        },
        "worst": {name: {"case": rows.index(row), name: row[name]} for name, row in worst.items()},
        "tensors": sum(row["tensors"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "factors": {factor: list(levels) for factor, levels in FACTORS.items()},
        "cases": rows,
    }


def table(record: dict[str, Any]) -> str:
    """Sums, a row for each case, and what the rules refuse."""
    return "\n".join([*_summary(record), "", *_cases(record), "", *_refused(record)])


def _summary(record: dict[str, Any]) -> Iterator[str]:
    pairs, worst = record["pairs"], record["worst"]
    known = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    yield (
        f"{record['date']}, {known}; fp32 on {record['machine']}. {len(record['cases'])} cases, {record['tensors']} tensors, "
        f"{record['seconds'] / 60:.0f} minutes. Commit {', '.join(record['commits'])}."
    )
    yield ""
    yield (
        f"Of {pairs['all']} pairs of levels {pairs['in a case']} occur in a case; the other {len(pairs['refused'])} the rules refuse, or "
        f"they need more than {RANKS} ranks."
    )
    yield ""
    yield "| | worst | in case |"
    yield "|---|---|---|"
    for name, what in (
        ("error", "a tensor's gradient: norm of the difference over its norm"),
        ("of_largest", "a gradient's entry: difference over the largest entry of all"),
        ("loss", "the loss: relative"),
    ):
        yield f"| {what} | {power(worst[name][name])} | {worst[name]['case']} |"


def _cases(record: dict[str, Any]) -> Iterator[str]:
    factors = record["factors"]
    heads = ["case", "ranks", *factors, "tensor with the largest error", "its error", "of the largest entry"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for number, row in enumerate(record["cases"]):
        levels = (
            row["case"][factor] if row["case"][factor] != DEFAULTS[factor] else "" for factor in factors
        )
        objective, *others = levels
        cells = [str(number), str(row["ranks"]), objective or DEFAULTS["objective"], *others]
        cells += [f"`{short(row['tensor'])}`", power(row["error"]), power(row["of_largest"])]
        yield f"| {' | '.join(cells)} |"


def power(value: float) -> str:
    """Two digits, as in 1.2e-6."""
    return f"{value:.1e}".replace("e-0", "e-")


def short(tensor: str) -> str:
    """A tensor's name without what all have."""
    for part in ("model.", "module.decoder.", ".weight"):
        tensor = tensor.replace(part, "")
    return tensor


def _refused(record: dict[str, Any]) -> Iterator[str]:
    """Level by level, each pair once."""
    yield "| does not go | with |"
    yield "|---|---|"
    left = [tuple(map(tuple, pair)) for pair in record["pairs"]["refused"]]
    while left:
        levels = [level for pair in left for level in pair]
        most = max(levels, key=levels.count)  # the first of those that occur most often
        others = [one if other == most else other for one, other in left if most in (one, other)]
        left = [pair for pair in left if most not in pair]
        yield f"| {' '.join(most)} | {', '.join(' '.join(other) for other in others)} |"


def with_table(page: str, record: dict[str, Any]) -> str:
    """The page with the record's table in its place."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table(record)}\n{END}{rest.split(END)[1]}"
