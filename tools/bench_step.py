"""Step time and memory of training with each form of the reference against training without one, in one run.

    python tools/bench_step.py --out runs/bench_step
    python tools/bench_step.py --layers 8 --hidden 512 --rounds 5 --pp 1 2 --out benchmarks/results --name cpu_step

Trains a random model whose head is small beside its body with `asft train`'s own code: sft, and asft with a resident, an offloaded and
a cached reference; with LoRA sft, and asft with adapters disabled. The runs of a round follow each other in one group of ranks and
every round repeats them all, so that a slow minute of the machine meets all of them; the ratio of a form is taken within each round.
Memory is measured afterwards, one group of ranks a form. Writes `<name>.json` and `<name>.md` into `--out`.

The law counts GEMMs: forward 1, backward 2 for each weight that is trained, 1 for a frozen weight (its input's gradient alone).
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench.training import FORMS, head_share, make_data, make_model, run_settings

log = logging.getLogger("bench_step")

WARM_UP_STEPS = 2
MEMORY_STEPS = 2  # of a run that is only looked at for its memory


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=4, help="a step")
    parser.add_argument("--pp", type=int, nargs="+", default=[1, 2], help="pipeline sizes")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a run")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory runs out")
    parser.add_argument("--name", default="bench_step")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def overrides(
    form: str,
    options: argparse.Namespace,
    pp_size: int,
    folder: Path,
    run_dir: Path,
    *,
    steps: int | None = None,
) -> list[str]:
    """Settings of one run, of `steps` steps where they are given."""
    settings = run_settings(
        FORMS[form],
        folder=folder,
        run_dir=run_dir,
        sequence_length=options.sequence_length,
        micro_batch_size=options.micro_batch_size,
        global_batch_size=options.micro_batch_size * options.micro_batches,
        steps=steps or WARM_UP_STEPS + options.steps,
    )
    return [*settings, f"parallel.pp_size={pp_size}"]


def step_seconds(run_dir: Path) -> float:
    """Median seconds of the measured steps."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["seconds"] for line in lines[WARM_UP_STEPS:])


def measure(options: argparse.Namespace, pp_size: int, folder: Path) -> dict[str, Any]:
    """Seconds of every round and memory of every form at one pipeline size."""
    from asft_nemo.config.load import compose
    from asft_nemo.launch_local import launch, launch_cache, launch_many

    if "cached" in options.forms and not (folder / "cache").exists():
        launch_cache(
            compose(overrides("cached", options, pp_size, folder, folder / "cache_run")), repair=False
        )
    places = {
        (form, number): folder / f"pp{pp_size}_{form}_{number}"
        for number in range(options.rounds)
        for form in options.forms
    }
    launch_many(
        [compose(overrides(form, options, pp_size, folder, place)) for (form, _), place in places.items()]
    )
    seconds = {
        form: [step_seconds(places[form, number]) for number in range(options.rounds)]
        for form in options.forms
    }
    memory = {}
    for form in () if options.no_memory else options.forms:
        place = folder / f"pp{pp_size}_{form}_memory"
        launch(compose(overrides(form, options, pp_size, folder, place, steps=MEMORY_STEPS)))
        memory[form] = json.loads((place / "summary.json").read_text())
    return {"seconds": seconds, "memory": memory}


def ratios(seconds: dict[str, list[float]], form: str) -> list[float]:
    """A form's seconds over those of what it is compared with, round by round."""
    return [own / other for own, other in zip(seconds[form], seconds[FORMS[form].against], strict=True)]


def table(results: dict[int, dict[str, Any]], *, head: float) -> str:
    """The results as Markdown; `head` is the head's share of the forward pass's products."""
    lines = []
    for pp_size, found in results.items():
        lines += [
            f"### PP{pp_size}",
            "",
            "| form | seconds a step | over | ratio, median (min to max) | law at PP1 |",
            "| --- | --- | --- | --- | --- |",
        ]
        for form, seconds in found["seconds"].items():
            row = FORMS[form]
            shown = ""
            if row.law is not None and row.against in found["seconds"]:
                values = ratios(found["seconds"], form)
                shown = f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
            law = row.law_at(head)
            over = FORMS[row.against].title if shown else ""
            lines.append(
                f"| {row.title} | {statistics.median(seconds):.3f} | {over} | {shown} | {'' if law is None else f'{law:.3f}'} |"
            )
        lines.append("")
        if found["memory"]:
            lines += [
                "| form | policy parameters, MiB | reference on device | in host memory | on disk | hidden states kept | peak RSS of a rank |",
                "| --- | --- | --- | --- | --- | --- | --- |",
            ]
            keys = (
                "policy_parameter_bytes",
                "reference_device_bytes",
                "reference_host_bytes",
                "reference_disk_bytes",
                "reference_hidden_bytes",
                "peak_rss_bytes",
            )
            for form, summary in found["memory"].items():
                cells = " | ".join(f"{summary[key] / 2**20:.1f}" for key in keys)
                lines.append(f"| {FORMS[form].title} | {cells} |")
            lines.append("")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Measures and writes."""
    options = _parser().parse_args(arguments)
    missing = {FORMS[form].against for form in options.forms} - set(options.forms)
    options.forms = [*sorted(missing), *options.forms]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from asft_nemo.run_dir import versions

    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="asft-bench-") as scratch:
        folder = Path(scratch)
        (folder / "model").mkdir()
        make_model(folder / "model", hidden=options.hidden, layers=options.layers)
        make_data(folder / "train.jsonl", examples=64, sequence_length=options.sequence_length)
        results = {}
        for pp_size in options.pp:
            log.info("PP%d: %d rounds of %s", pp_size, options.rounds, ", ".join(options.forms))
            results[pp_size] = measure(options, pp_size, folder)
    shown = {key: value for key, value in vars(options).items() if key not in ("out", "name")}
    record = {
        "date": date.today().isoformat(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
        },
        "versions": versions(),
        "options": shown,
        "results": results,
    }
    (options.out / f"{options.name}.json").write_text(json.dumps(record, indent=2) + "\n")
    text = table(results, head=head_share(hidden=options.hidden, layers=options.layers))
    (options.out / f"{options.name}.md").write_text(text + "\n")
    log.info("%s", text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
