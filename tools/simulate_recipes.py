"""Every recipe at its full size, built without data and traced, against the planner's arithmetic.

    python tools/simulate_recipes.py --out benchmarks/results --name simulation

For the first rank of every pipeline stage of every recipe, `asft_nemo.nemo.simulate` builds what a run builds and counts it; a micro batch goes
forward and backward through the first, the middle and the last stage. Counts must equal the planner's, bytes of activations and peaks must be
within 10 %. FP8 recipes are built as their bf16 twins. Writes `<name>.json` and `<name>.md` into `--out`; exit code 1 where anything differs
by more. Two to four minutes, one process, no GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

log = logging.getLogger("simulate_recipes")

EXACT = ("weights", "gradients", "optimizer", "reference", "reference_hidden")
NEAR = {"activations": "activations_in_flight", "peak": "peak"}  # the planner's name: the simulation's
TOLERANCE = 0.10


def compared(job: Any, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every stage as simulated and as planned: what is to be equal, and the ratios of what is to be near."""
    from asft_nemo.config.schema import replace
    from asft_nemo.planner.memory import memory_of
    from asft_nemo.planner.precision import widths_of

    built = replace(job.run, {"precision": result["precision"]})
    rows = []
    planned_stages = memory_of(built, job.spec, widths_of(built))
    for simulated, planned in zip(result["stages"], planned_stages, strict=True):
        counts = {"parameters": (simulated["parameters"], planned.parameters.total)}
        counts |= {part: (simulated[part], getattr(planned, part)) for part in EXACT}
        near = {}
        if simulated["peak"] is not None:
            counts["passes_in_flight"] = (simulated["passes_in_flight"], planned.in_flight)
            near = {name: getattr(planned, name) / simulated[key] for name, key in NEAR.items()}
        rows.append(
            {
                "stage": simulated["stage"],
                "parameters": simulated["parameters"],
                "simulated_bytes": {name: simulated[key] for name, key in NEAR.items()},
                "differing": {name: pair for name, pair in counts.items() if pair[0] != pair[1]},
                "planned_over_simulated": near,
            }
        )
    return rows


def agrees(rows: list[dict[str, Any]]) -> bool:
    """Whether counts are equal and bytes near."""
    return all(
        not row["differing"]
        and all(abs(ratio - 1) <= TOLERANCE for ratio in row["planned_over_simulated"].values())
        for row in rows
    )


def table(found: dict[str, dict[str, Any]]) -> str:
    """A line for each recipe, as Markdown."""
    lines = [
        "| recipe | built in | stages | counts | activations, planned over simulated | peak, planned over simulated | largest peak, GB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in found.items():
        rows = one["stages"]
        counts = "equal" if not any(row["differing"] for row in rows) else "differ"
        near = [_span([row["planned_over_simulated"].get(key) for row in rows]) for key in NEAR]
        most = max(row["simulated_bytes"]["peak"] or 0 for row in rows) / 1e9
        cells = [f"`{name}`", one["precision"], str(len(rows)), counts, *near, f"{most:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _span(ratios: list[float | None]) -> str:
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{min(known):.3f} to {max(known):.3f}"


def main(arguments: list[str]) -> int:
    """Simulates, compares and writes. Returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    from asft_nemo.commands.simulation import Job, simulated
    from asft_nemo.config.load import compose
    from asft_nemo.config.recipes import known_recipes, recipe_model
    from asft_nemo.planner.published import spec_of_recipe
    from asft_nemo.run_dir import git_commit, versions

    jobs = {}
    for name in options.recipes or [known for known in known_recipes() if recipe_model(known)]:
        words = [f"recipe={name}", "objective=asft", "model.path=as published"]
        spec = spec_of_recipe(name)
        assert spec is not None
        jobs[name] = Job(compose(words, check_inputs=False), spec)
    started = time.monotonic()
    results = dict(zip(jobs, simulated([*jobs.values()]), strict=True))
    found = {
        name: {
            "precision": result["precision"],
            "notes": result["notes"],
            "stages": compared(jobs[name], result),
        }
        for name, result in results.items()
    }
    record = {
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "versions": versions(),
        "machine": platform.platform(),
        "seconds": time.monotonic() - started,
        "recipes": found,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / f"{options.name}.md").write_text(f"{_head(record)}\n\n{table(found)}\n")
    apart = [name for name, one in found.items() if not agrees(one["stages"])]
    log.info("%d recipes simulated in %.0f s; %s", len(found), record["seconds"], table(found))
    if apart:
        log.error("the planner and the simulation differ: %s", ", ".join(apart))
    return 1 if apart else 0


def _head(record: dict[str, Any]) -> str:
    known = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    return (
        f"`tools/simulate_recipes.py`, {record['date']}, commit {record['commit']}, {record['seconds']:.0f} s on {record['machine']}. {known}.\n\n"
        "No GPU and no Transformer Engine: its layers are stand-ins, and FP8 recipes were built as their bf16 twins."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", help="names; none = all that are made for a published model")
    parser.add_argument("--out", type=Path, default=Path("runs/simulation"))
    parser.add_argument("--name", default="simulation")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
