"""The forms that `tools/gpu_check.py` trains, what they need of the machine, and what their runs leave."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import nemo_convert, outside_fp8, te_checkpoint
from bench.compared import figures
from bench.gpu_parts import TIME_IS_UP, Check, free_of
from bench.gpu_rank import at, sentence
from bench.gpu_ranks import RankFailed
from bench.layer_kinds import LOCAL_FORMS
from bench.training import FORMS, QWEN25_1P5B, Form, make_data, make_model, run_settings

log = logging.getLogger("gpu_check")

FORM_SECONDS = 900  # of one run; ranks that hang are named by each other before (alarms.hang_seconds)
CONVERSION_SECONDS = 300  # of one direction

# A random model's KL at step 0 says nothing of a trained one's, so the bound is out of the way; the KL itself is in the table.
_FP8 = ("objective=asft", "reference=resident", "reference.precision=fp8", "reference.max_initial_kl=1000")
_LORA_FP8 = (
    "objective=asft",
    "peft=lora",
    "optim.lr=5e-4",
    "reference=adapter_disabled",
    "precision=fp8_current",
)
# The policy itself in FP8, each beside the same run in bf16
PRECISIONS = {
    **{
        f"sft_{name}": Form(f"sft, precision={name}", ("objective=sft", f"precision={name}"), "sft")
        for name in ("fp8_current", "fp8_blockwise", "fp8_delayed")
    },
    "resident_fp8_current": Form(
        "asft, resident, precision=fp8_current",
        ("objective=asft", "reference=resident", "precision=fp8_current"),
        "resident",
    ),
    "lora_fp8_current": Form("LoRA asft, precision=fp8_current", _LORA_FP8, "lora_adapter_disabled"),
}
PROFILED = Form(
    "asft, resident, profiled", ("objective=asft", "reference=resident", "trainer.profile=steps:3-4"), "sft"
)
CHECKED = {
    **FORMS,
    "resident_profiled": PROFILED,
    **LOCAL_FORMS,
    "resident_fp8": Form("asft, resident in FP8", _FP8, "sft"),
    **PRECISIONS,
}


def lacks(settings: Iterable[str]) -> str | None:
    """What this machine has not of what these settings need, in words."""
    from asft_nemo.config.fp8 import FP8, fp8_missing
    from asft_nemo.config.machine import part

    for name in (name for name, row in FP8.items() if f"{row.key}={name}" in settings):
        if (missing := fp8_missing(name)) is not None:
            return missing
    there = part("transformer_engine").there()
    return None if there or "kernels.layers=local" not in settings else "Transformer Engine to compare with"


def attempt(
    what: str, settings: Iterable[str], check: Check, work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `work` finds, or why it was `skipped` or `failed`."""
    if (missing := lacks(settings)) is not None:
        return {"skipped": f"no {missing}"}
    try:
        return work()
    except RankFailed as failed:
        if check.late():
            return {"skipped": f"{TIME_IS_UP}: {failed}"}
        log.error("%s: %s\n%s", what, failed, failed.log)
        return {"failed": str(failed)}
    except Exception as error:  # the others still tell something
        log.exception("%s", what)
        return {"failed": sentence(error)}


def overrides(form: str, options: argparse.Namespace, folder: Path, run_dir: Path) -> list[str]:
    """Settings of one run."""
    settings = run_settings(
        CHECKED[form],
        folder=folder,
        run_dir=run_dir,
        sequence_length=options.sequence_length,
        micro_batch_size=options.micro_batch_size,
        global_batch_size=options.micro_batch_size * options.micro_batches * options.gpus,
        steps=options.steps,
    )
    if not any(setting.startswith("precision=") for setting in settings):
        settings.append(f"precision={options.precision}")
    return [*settings, f"run.world_size={options.gpus}"]


def found_in(run_dir: Path) -> dict[str, Any]:
    """What a finished run says of itself: its summary, its first step's KL, and its last step's loss, seconds and tokens a second."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "summary": json.loads((run_dir / "summary.json").read_text()),
        "kl_at_step_0": lines[0]["kl"],
        "seconds_of_last_step": lines[-1]["seconds"],
        "loss_of_last_step": figures(lines, "loss")[-1],
        "losses": figures(lines, "loss"),
        "grad_norms": figures(lines, "grad_norm"),
        "tokens_per_second": lines[-1]["tokens_per_second"],
    }


def train_run(settings: list[str]) -> None:
    """`asft train` with these settings, without its launcher; called on every rank."""
    from asft_nemo.config.load import compose
    from asft_nemo.train import train

    at("training")
    train(compose(settings))


def measure(form: str, check: Check, folder: Path) -> dict[str, Any]:
    """Runs one form; what it says of itself, or why it did not run (`skipped`) or broke (`failed`)."""
    options = check.options

    def on_ranks(call: str, settings: list[str]) -> None:
        with check.ranks(options.gpus) as ranks:
            ranks.run(call, timeout=FORM_SECONDS, settings=settings)

    def work() -> dict[str, Any]:
        run_dir = folder / form
        settings = overrides(form, options, folder, run_dir)
        if "reference=cached" in settings:
            on_ranks("bench.gpu_train:write_cache", overrides(form, options, folder, folder / "cache_run"))
        on_ranks("bench.gpu_forms:train_run", settings)
        free_of(run_dir / "checkpoints")  # in the sizes of --shape 20 GB each
        return found_in(run_dir)

    return attempt(form, CHECKED[form].settings, check, work)


def model_folder(check: Check) -> Path:
    """Where the random model and its examples are; they are made by whichever part asks first."""
    folder, options = check.folder / "forms", check.options
    if not (folder / "train.jsonl").exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "model").mkdir(parents=True)
        published = QWEN25_1P5B if options.shape else None
        make_model(folder / "model", hidden=options.hidden, layers=options.layers, published=published)
        examples = max(64, options.micro_batch_size * options.micro_batches * options.gpus)
        make_data(folder / "train.jsonl", examples=examples, sequence_length=options.sequence_length)
    return folder


def check_forms(check: Check) -> dict[str, Any]:
    """Trains every form that is asked for and those that they are compared with, while there is time."""
    from bench.gpu_form_tables import form_bars

    options, folder = check.options, model_folder(check)
    wanted = {CHECKED[form].against for form in options.forms} | {"sft", *options.forms}
    runs: dict[str, dict[str, Any]] = {}
    longest, left = 0.0, check.left()
    for form in (form for form in CHECKED if form in wanted):
        if left < longest:
            runs[form] = {"skipped": "--minutes has no room for it"}
            continue
        runs[form] = measure(form, check, folder)
        longest, left = max(longest, left - check.left()), check.left()
    return {"runs": runs, "bars": form_bars(runs)}


def check_outside(check: Check) -> dict[str, Any]:
    """Head, embedding and loss of an asft run in each precision of FP8 that has a reference like itself, one rank."""
    options, folder = check.options, model_folder(check)
    outside = {}
    for name in ("fp8_current", "fp8_blockwise"):
        run_dir = folder / f"outside_{name}"
        one = argparse.Namespace(**{**vars(options), "gpus": 1, "steps": 1})
        settings = [*overrides("resident", one, folder, run_dir), f"precision={name}"]
        settings.remove(f"precision={options.precision}")
        outside[name] = attempt(
            name,
            settings,
            check,
            lambda given=settings: check.alone(
                "bench.outside_fp8:look", timeout=FORM_SECONDS, settings=given
            ),
        )
        free_of(run_dir / "checkpoints")
    seen_any = [one for one in outside.values() if "tensors" in one]
    failed = [one for one in outside.values() if "failed" in one]
    off = {"measured": len(failed) + sum(map(outside_fp8.is_off, seen_any)), "limit": 0}
    reason = {"reason": next((one["skipped"] for one in outside.values() if "skipped" in one), None)}
    return {"outside": outside, "bars": {"off": off if seen_any or failed else reason}}


def check_kept(check: Check) -> dict[str, Any]:
    """Copies the profile's pages and writes the checkpoints for tests; says where they are."""
    options, kept = check.options, {}
    pages = check.folder / "forms" / "resident_profiled" / "profile"
    out = options.out / f"{options.name}_profile"
    if (pages / "summary.md").is_file():
        shutil.copytree(pages, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.trace.json.gz"))
        kept["profile"] = {"kept": str(out)}
    elif pages.parent.exists():
        kept["profile"] = {"failed": "the profiled run left no page"}
    from asft_nemo.config.machine import part

    for name in te_checkpoint.PRECISIONS:
        target, settings = (options.out / "te_checkpoint").resolve(), [f"precision={name}"]
        if not part("transformer_engine").there():
            kept[f"checkpoint, {name}"] = {"skipped": "no Transformer Engine"}
            continue
        kept[f"checkpoint, {name}"] = attempt(
            name,
            settings,
            check,
            lambda name=name, target=target: check.alone(
                "bench.te_checkpoint:kept",
                timeout=FORM_SECONDS,
                out=str(target),
                scratch=str(check.folder / "tiny"),
                precision=name,
            ),
        )
    failed = {"measured": sum("failed" in one for one in kept.values()), "limit": 0}
    return {"kept": kept, "hint": te_checkpoint.hint(Path("te_checkpoint")), "bars": {"failed": failed}}


def check_conversion(check: Check) -> dict[str, Any]:
    """NeMo's importer and exporter beside ours, on the random model of the forms."""
    model, place = model_folder(check) / "model" / "hf", check.place("conversion")
    rows = nemo_convert.measure(model, place, seconds=max(min(check.left(), CONVERSION_SECONDS), 1))
    return {"conversion": rows, "bars": nemo_convert.bars(rows)}
