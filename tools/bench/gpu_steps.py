"""Steps of training with each form of the reference beside steps without one: time against the law, and peak memory.

Runs alternate, without a reference, with one, without, each in a process of its own: a form's steps are held against those of the
run before it and of the run behind it, so that clocks that drift do not count.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asft_nemo.planner.published import PUBLISHED
from bench.gpu_parts import GIB, NEMO, Bar, Check, Part, SkipPart, cell, disk_gib, free_of, gpu_gib
from bench.gpu_ranks import RankFailed
from bench.training import FORMS, make_data, run_settings

log = logging.getLogger("gpu_check")

ABOVE_LAW, PEAK = 0.03, 1.05
SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Steps:
    """One model and the forms that it is trained with.

    Attributes:
        model: its hub id, a key of the planner's published sizes.
        forms: keys of `FORMS` that have a reference, the most telling first; all are held against the same form without one.
        peaks: those of them whose peak memory has a bar.
        sequence_length, micro_batch_size, micro_batches: of a step.
        warm_up, counted: steps.
    """

    model: str
    forms: tuple[str, ...]
    peaks: tuple[str, ...] = ()
    sequence_length: int = 2048
    micro_batch_size: int = 2
    micro_batches: int = 4
    warm_up: int = 4
    counted: int = 10

    @property
    def against(self) -> str:
        """The form without a reference."""
        return FORMS[self.forms[0]].against


FULL = Steps("Qwen/Qwen2.5-1.5B", ("cached", "offloaded", "resident"), ("cached", "offloaded"))
LORA = Steps("Qwen/Qwen2.5-7B", ("lora_adapter_disabled",), micro_batch_size=1, micro_batches=8)
SMALL_MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
_SMALL_SIZES = {"sequence_length": 64, "micro_batch_size": 1, "micro_batches": 2, "warm_up": 1, "counted": 2}


def rehearsal(steps: Steps) -> Steps:
    """The same at sizes that a CPU does."""
    return Steps(**{**vars(steps), **_SMALL_SIZES})


def shape(steps: Steps, *, small: bool) -> dict[str, Any]:
    """The model's config.json."""
    return {**PUBLISHED[steps.model], **(SMALL_MODEL if small else {})}


def settings(steps: Steps, form: str, check: Check, folder: Path, run_dir: Path) -> list[str]:
    """Of one run."""
    given = run_settings(
        FORMS[form],
        folder=folder,
        run_dir=run_dir,
        sequence_length=steps.sequence_length,
        micro_batch_size=steps.micro_batch_size,
        global_batch_size=steps.micro_batch_size * steps.micro_batches,
        steps=steps.warm_up + steps.counted,
    )
    return [*given, f"precision={check.options.precision}", "run.world_size=1"]


def check_steps(steps: Steps, check: Check) -> dict[str, Any]:
    """Makes the model and trains: without a reference, with one, without, with the next one, and so on."""
    steps = rehearsal(steps) if check.small else steps
    folder = check.place(f"steps_{steps.against}")
    try:
        parameters = _prepare(steps, check, folder)
        runs = _runs(steps, check, folder)
    finally:
        free_of(folder)
    rows = compared(runs)
    sizes = {key: value for key, value in vars(steps).items() if key not in ("forms", "peaks")}
    found = {"parameters": parameters, "sizes": sizes, "runs": runs, "rows": rows}
    return {**found, "overlap": overlap(runs), "bars": bars(rows, steps)}


def _prepare(steps: Steps, check: Check, folder: Path) -> int:
    """Model and examples; parameters."""
    config = shape(steps, small=check.small)
    parameters = check.alone(
        "bench.gpu_train:write_model",
        timeout=1500,
        folder=str(folder),
        config=config,
        shard_bytes=SHARD_BYTES,
    )
    examples = steps.micro_batch_size * steps.micro_batches * (steps.warm_up + steps.counted)
    prompt = max(1, round(check.options.prompt_share * steps.sequence_length))
    make_data(folder / "train.jsonl", examples=examples, sequence_length=steps.sequence_length, prompt=prompt)
    return parameters


def _runs(steps: Steps, check: Check, folder: Path) -> list[dict[str, Any]]:
    """Without a reference, with one, without, and so on while there is time.

    Raises:
        RankFailed: the first run did.
        SkipPart: there was no time for one run with a reference.
    """
    runs: list[dict[str, Any]] = []
    longest = 0.0
    for number, form in enumerate((steps.against, *_alternating(steps))):
        if number % 2 and check.left() < 2.2 * longest:  # this run and the one behind it
            break
        began = time.monotonic()
        try:
            runs.append({"form": form, **_train(steps, form, check, folder, folder / f"run_{number}")})
        except RankFailed as failed:
            if not runs:  # nothing to hold the others against
                raise
            if check.late():
                break
            log.error("%s: %s\n%s", form, failed, failed.log)
            runs.append({"form": form, "failed": str(failed)})
        free_of(folder / f"run_{number}")
        longest = max(longest, time.monotonic() - began)
    if len(runs) < 3:
        raise SkipPart(f"a run took {longest / 60:.1f} minutes, and --minutes has no room for two more")
    return runs


def _alternating(steps: Steps) -> Iterable[str]:
    for form in steps.forms:
        yield from (form, steps.against)


def _train(steps: Steps, form: str, check: Check, folder: Path, run_dir: Path) -> dict[str, Any]:
    given = settings(steps, form, check, folder, run_dir)
    if "reference=cached" in given and not (folder / "cache").exists():
        with check.ranks(1) as ranks:
            ranks.run("bench.gpu_train:write_cache", timeout=900, settings=given)
    with check.ranks(1) as ranks:
        return ranks.run(
            "bench.gpu_train:train_form",
            timeout=900,
            settings=given,
            warm_up=steps.warm_up,
            watch_copies=form == "offloaded",
        )[0]


def compared(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each form beside the two runs around it: seconds, their ratio, the law for what it computed, and peaks.

    The law is the ratio of operations, as the planner counts them, of the tokens that were really learned.
    """
    rows = []
    for before, run, behind in zip(runs[0::2], runs[1::2], runs[2::2], strict=False):
        if failed := [one["failed"] for one in (run, before, behind) if "failed" in one]:
            rows.append({"form": run["form"], "failed": failed[0]})
            continue
        seconds = [statistics.median(one["seconds"]) for one in (before, run, behind)]
        least = [min(one["seconds"]) for one in (before, run, behind)]
        peaks = [one["peak_bytes"] for one in (before, run, behind)]
        rows.append(
            {
                "form": run["form"],
                "seconds": seconds,
                "least": least,
                "ratio": seconds[1] / statistics.mean((seconds[0], seconds[2])),
                "ratio_of_least": least[1] / min(least[0], least[2]),
                "law": run["operations"] / statistics.mean((before["operations"], behind["operations"])),
                "learned_share": run["learned_share"],
                "mfu": run["mfu"],
                "peak_bytes": peaks,
                "peak_ratio": peaks[1] / max(peaks[0], peaks[2]) if all(peaks) else None,
            }
        )
    return rows


def overlap(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How much of an offloaded reference's copy to the device its own pass hides; None where that was not measured.

    What the pass takes more than a resident reference's is what is not hidden.
    """
    by_form = {run["form"]: run for run in runs if "failed" not in run}
    offloaded, resident = by_form.get("offloaded"), by_form.get("resident")
    if offloaded is None or resident is None or not offloaded["copy_seconds"]:
        return None
    copy = statistics.median(offloaded["copy_seconds"])
    passes = [statistics.median(run["reference_seconds"]) for run in (offloaded, resident)]
    exposed = min(max(passes[0] - passes[1], 0.0), copy)
    return {
        "copy_seconds": copy,
        "bytes": offloaded["reference_host_bytes"],
        "pass_seconds": passes[0],
        "resident_pass_seconds": passes[1],
        "hidden_share": 1 - exposed / copy,
    }


def bars(rows: Sequence[Mapping[str, Any]], steps: Steps) -> dict[str, dict[str, Any]]:
    """What the bars are judged by."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        form = row["form"]
        if "failed" in row:
            found |= {f"{key}_{form}": {"reason": row["failed"]} for key in ("ratio", "peak")}
            continue
        found[f"ratio_{form}"] = {"measured": row["ratio"], "limit": row["law"] + ABOVE_LAW}
        if form in steps.peaks:
            found[f"peak_{form}"] = {"measured": row["peak_ratio"], "limit": PEAK}
    return found


def table(found: Mapping[str, Any]) -> str:
    """As Markdown."""
    sizes = found["sizes"]
    lines = [
        f"{sizes['model']}'s shape ({found['parameters'] / 1e9:.2f} billion parameters, random), {sizes['micro_batches']} micro batches of "
        f"{sizes['micro_batch_size']} x {sizes['sequence_length']} tokens a step; {sizes['counted']} steps after {sizes['warm_up']}.",
        "",
        "| form | ms a step: before, its own, behind | ratio | of the fastest steps | law | learned tokens | mfu | peak, GiB: before, its own, "
        "behind | of theirs |",
        "| --- " * 9 + "|",
    ]
    for row in found["rows"]:
        title = FORMS[row["form"]].title
        if "failed" in row:
            lines.append(f"| {title} | failed: {cell(row['failed'])} |" + " |" * 7)
            continue
        shown = ", ".join(f"{1000 * one:.1f}" for one in row["seconds"])
        peaks = ", ".join("-" if one is None else f"{one / GIB:.2f}" for one in row["peak_bytes"])
        lines.append(
            f"| {title} | {shown} | {row['ratio']:.3f} | {row['ratio_of_least']:.3f} | {row['law']:.3f} | {row['learned_share']:.0%} | "
            f"{_or_dash(row['mfu'])} | {peaks} | {_or_dash(row['peak_ratio'])} |"
        )
    copied = found["overlap"]
    if copied is not None:
        lines += [
            "",
            f"Offloaded: {copied['bytes'] / GIB:.2f} GiB to the device in {1000 * copied['copy_seconds']:.1f} ms a step; the reference's pass "
            f"takes {1000 * copied['pass_seconds']:.1f} ms, a resident one's {1000 * copied['resident_pass_seconds']:.1f} ms: "
            f"{copied['hidden_share']:.0%} of the copy is hidden.",
        ]
    return "\n".join(lines)


def _or_dash(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"


def _part(name: str, title: str, steps: Steps, *needs: Any, seconds: float) -> Part:
    promised = [
        Bar(f"ratio_{form}", f"step of {FORMS[form].title} over {FORMS[steps.against].title}", "law + 0.03")
        for form in steps.forms
    ]
    promised += [
        Bar(f"peak_{form}", f"peak memory of {FORMS[form].title} over {FORMS[steps.against].title}", "1.05")
        for form in steps.peaks
    ]
    return Part(
        name, title, (NEMO, *needs), seconds, lambda check: check_steps(steps, check), table, promised
    )


PARTS = (
    _part(
        "steps_full",
        "Steps of Qwen2.5-1.5B's shape, all weights trained",
        FULL,
        gpu_gib(60),
        disk_gib(12),
        seconds=420,
    ),
    _part(
        "steps_lora", "Steps of Qwen2.5-7B's shape with LoRA", LORA, gpu_gib(40), disk_gib(36), seconds=300
    ),
)
