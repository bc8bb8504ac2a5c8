"""Short seeded runs whose metrics are compared: with another commit's, and with golden files.

    python tools/bench/loss_runs.py RUNS.json TREE      the file holds a list of runs, each the words of `asft train`

Called that way from a commit's tree, with PYTHONPATH set to it, it trains with that commit's code, runs of one world size in one group of ranks. So it
asks of `asft_nemo` no more than `config.load.compose` and `launch_local.launch_many`.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# kl_weight 0.5 is ten times the default: the anchor then has a part in every gradient that no rounding hides.
_ANCHORED = ("objective.kl_weight=0.5", "reference=resident")
OBJECTIVES: Mapping[str, tuple[str, ...]] = {
    "sft": ("objective=sft",),
    "dft": ("objective=dft",),
    "sft_kl": ("objective=sft_kl", *_ANCHORED),
    "asft": ("objective=asft", *_ANCHORED),
    "asft_reverse": ("objective=asft", "objective.kl_direction=reverse", *_ANCHORED),
    "asft_sft": ("objective=asft_sft",),
    "iw_sft": ("objective=iw_sft", "reference=resident"),
    "eaft": ("objective=eaft",),
    "psft": ("objective=psft",),
}
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "tp1": (),
    "tp2_pp2": ("parallel.tp_size=2", "parallel.pp_size=2"),
    "tp2": ("parallel.tp_size=2",),
}
STEPS = 20
ROWS = 96
NOT_COMPARED = frozenset(
    {
        "seconds",
        "reference_seconds",
        "tokens_per_second",
        "tokens_per_second_per_gpu",
        "tflops_per_gpu",
        "reference_tflops_per_gpu",
        "mfu",
        "memory_bytes",
    }
)


def write_rows(file: Path) -> Path:
    """Questions with answers of one to nine words, which the shipped model has never seen; the same on every machine."""
    drawn = random.Random(0)
    lines = []
    for _ in range(ROWS):
        words = [
            "".join(drawn.choices("abcdefgh", k=drawn.randint(1, 3))) for _ in range(drawn.randint(1, 9))
        ]
        asked = f"swap {' '.join(reversed(words))}"
        lines.append(json.dumps({"prompt": asked, "response": " ".join(words)}))
    file.write_text("\n".join(lines) + "\n")
    return file


def words_of(objective: str, layout: str, *, steps: int, rows: Path, run_dir: Path) -> list[str]:
    """A run as `asft train` is told it: the model that ships, four micro batches a step, twelve steps an epoch of shuffled rows."""
    return [
        "recipe=tiny_cpu",
        *OBJECTIVES[objective],
        *LAYOUTS[layout],
        f"data.train=[{rows}]",
        "data.template=raw",
        "data.sequence_length=96",
        f"trainer.max_steps={steps}",
        "run.seed=11",
        f"run.dir={run_dir}",
    ]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What a run logged, step by step, without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in NOT_COMPARED} for line in lines]


def train(runs: list[list[str]], tree: Path) -> None:
    """Trains them with the `asft_nemo` of a tree, runs of as many ranks one after another in one group."""
    import asft_nemo
    from asft_nemo.config.load import compose
    from asft_nemo.launch_local import launch_many

    found = Path(str(asft_nemo.__file__)).resolve().parents[1]
    if found != tree.resolve():
        raise RuntimeError(f"asft_nemo comes from {found} and not from {tree}")
    composed = [compose(words) for words in runs]
    for size in sorted({run.run.world_size for run in composed}):
        launch_many([run for run in composed if run.run.world_size == size])


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
