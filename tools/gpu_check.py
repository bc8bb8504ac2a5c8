"""What only a GPU can show: peak memory of training with each form of the reference, and how exact the loss is there.

    python tools/gpu_check.py --out runs/gpu_check
    python tools/gpu_check.py --hidden 2048 --layers 24 --gpus 1 --out benchmarks/results --name h100
    python tools/gpu_check.py --shape 1.5b --steps 50 --forms sft_fp8_current sft_fp8_blockwise --out runs/gpu_check

Trains a random model with `asft train`'s own code, one group of ranks a form: sft as the measure, asft with a resident, an offloaded and
a cached reference, LoRA sft, LoRA asft with adapters disabled, and, where Transformer Engine is, the same in Megatron's own layers, whose
losses and gradients must be bf16's, a resident reference in FP8, and policies in FP8, whose loss must stay within 1 % of bf16's after
the 50 steps of the third line. Peak memory is that of torch's allocator, the most of any rank (`peak_device_bytes` in a run's summary.json).
Looks whether head and loss of the FP8 runs are bf16. Then compares the fused loss with the dense fp64 oracle in bf16 and fp32, with the
Triton kernels and without, and puts NeMo's own importer and exporter beside ours. Writes `<name>.json` and `<name>.md` into `--out`, the pages
of a profiled run, and a checkpoint of Transformer Engine's layers for the tests (`te_checkpoint/`).

Exit codes: 0 all ran and all errors are within their bounds; 1 a form failed or a loss is off; 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench import layer_kinds, nemo_convert, outside_fp8, te_checkpoint
from bench.gpu_forms import CHECKED, PRECISIONS, attempt, lacks
from bench.layer_kinds import LOCAL_FORMS
from bench.training import QWEN25_1P5B, make_data, make_model, run_settings

log = logging.getLogger("gpu_check")

MIB = 2**20
LOSS_OF_FP8 = 0.01  # of bf16's, after the last step of at least 50
_BYTES = {
    "policy parameters": "policy_parameter_bytes",
    "reference on device": "reference_device_bytes",
    "in host memory": "reference_host_bytes",
    "on disk": "reference_disk_bytes",
    "hidden states kept": "reference_hidden_bytes",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument(
        "--shape", choices=("1.5b",), help="Qwen2.5-1.5B's sizes instead of --hidden and --layers"
    )
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4, help="a step")
    parser.add_argument("--steps", type=int, default=4, help="at least 4, for the profiled run")
    parser.add_argument("--gpus", type=int, default=1, help="data-parallel ranks of each run")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the policy")
    parser.add_argument("--forms", nargs="+", choices=list(CHECKED), default=list(CHECKED))
    parser.add_argument("--tokens", type=int, default=2048, help="of the loss checks")
    parser.add_argument("--vocab", type=int, default=32768, help="of the loss checks")
    parser.add_argument("--name", default="gpu_check")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def refusal(gpus: int) -> str | None:
    """The sentence for a machine that cannot be checked; None where it can."""
    import torch

    if os.environ.get("ASFT_DEVICE", "").lower() == "cpu":
        return "gpu_check measures a GPU, and ASFT_DEVICE=cpu asks for the CPU: unset it"
    if not torch.cuda.is_available():
        return "gpu_check needs a CUDA GPU, and torch sees none here: run it on a machine that has one (docs/container.md)"
    if gpus > torch.cuda.device_count():
        return f"--gpus {gpus} asks for more than the {torch.cuda.device_count()} GPUs here: lower it"
    return None


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
        "loss_of_last_step": lines[-1]["loss"],
        "losses": [line["loss"] for line in lines],
        "grad_norms": [line["grad_norm"] for line in lines],
        "tokens_per_second": lines[-1]["tokens_per_second"],
    }


def look_outside(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Head, embedding and loss of an asft run in each precision of FP8 that has a reference like itself, one rank."""
    found = {}
    for name in ("fp8_current", "fp8_blockwise"):
        run_dir, seen = folder / f"outside_{name}", folder / f"seen_{name}"
        one = argparse.Namespace(**{**vars(options), "gpus": 1, "steps": 1})
        settings = [*overrides("resident", one, folder, run_dir), f"precision={name}"]
        settings.remove(f"precision={options.precision}")
        seen.mkdir()
        found[name] = attempt(
            name, settings, lambda given=settings, where=seen: outside_fp8.look(given, where)
        )
    return found


def keep(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Copies the profile's pages and writes the checkpoints for tests; says where they are."""
    kept: dict[str, Any] = {}
    pages, out = folder / "resident_profiled" / "profile", options.out / f"{options.name}_profile"
    if (pages / "summary.md").is_file():
        shutil.copytree(pages, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.trace.json.gz"))
        kept["profile"] = {"kept": str(out)}
    elif "resident_profiled" in options.forms:
        kept["profile"] = {"failed": "the profiled run left no page"}
    from asft_nemo.config.machine import part

    for name in te_checkpoint.PRECISIONS:
        target, settings = options.out / "te_checkpoint", [f"precision={name}"]
        if not part("transformer_engine").there():
            kept[f"checkpoint, {name}"] = {"skipped": "no Transformer Engine"}
            continue
        kept[f"checkpoint, {name}"] = attempt(
            name,
            settings,
            lambda name=name, target=target: {
                "kept": str(te_checkpoint.write(target, folder / "tiny", name))
            },
        )
    return kept


def kept_list(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """Where things were left, as Markdown."""
    return "\n".join(f"* {what}: {next(iter(one.values()))}" for what, one in kept.items())


def measure(form: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs one form; what it says of itself, or why it did not run (`skipped`) or broke (`failed`)."""
    from asft_nemo.config.load import compose
    from asft_nemo.launch_local import launch, launch_cache

    if (missing := lacks(CHECKED[form].settings)) is not None:
        return {"skipped": f"no {missing}"}
    run_dir = folder / form
    try:
        settings = overrides(form, options, folder, run_dir)
        if "reference=cached" in settings:
            launch_cache(
                compose(overrides(form, options, folder, folder / "cache_run")),
                repair=False,
            )
        launch(compose(settings))
        return found_in(run_dir)
    except Exception as error:  # the other forms still tell something
        log.exception("%s", form)
        return {"failed": f"{type(error).__name__}: {error}"}


def memory_table(runs: Mapping[str, dict[str, Any]]) -> str:
    """Peaks of all forms as Markdown, with the ratio to sft's and to the form it is compared with."""
    head = ["form", "peak, MiB", "of sft's", "of its own sft's", *(f"{title}, MiB" for title in _BYTES)]
    lines = ["| " + " | ".join([*head, "KL at step 0"]) + " |", "| --- " * (len(head) + 1) + "|"]
    for form, run in runs.items():
        cells = [CHECKED[form].title]
        if "summary" not in run:
            reason = run.get("skipped") or f"failed: {run['failed']}"
            shown = str(reason).splitlines()[0].replace("|", "/")
            lines.append("| " + " | ".join([cells[0], shown, *[""] * (len(head) - 1)]) + " |")
            continue
        peak = run["summary"]["peak_device_bytes"]
        cells.append(f"{peak / MIB:.1f}")
        cells += [_ratio(peak, runs.get(measure)) for measure in ("sft", CHECKED[form].against)]
        cells += [f"{run['summary'][key] / MIB:.1f}" for key in _BYTES.values()]
        kl = run["kl_at_step_0"]
        lines.append("| " + " | ".join([*cells, "" if kl is None else f"{kl:.2e}"]) + " |")
    return "\n".join(lines)


def fp8_is_off(form: str, runs: Mapping[str, dict[str, Any]]) -> bool | None:
    """Whether a policy in FP8 ended further from bf16's loss than `LOSS_OF_FP8`; None where one of the two is not there."""
    own, other = runs.get(form, {}), runs.get(CHECKED[form].against, {})
    if "loss_of_last_step" not in own or "loss_of_last_step" not in other:
        return None
    # written so that a loss that is not a number is off, too
    bound = LOSS_OF_FP8 * abs(other["loss_of_last_step"])
    return not abs(own["loss_of_last_step"] - other["loss_of_last_step"]) <= bound


def precision_table(runs: Mapping[str, dict[str, Any]]) -> str:
    """Policies in FP8 as Markdown, each with the ratios to the same run in bf16."""
    lines = ["| policy | loss | of bf16's | tokens/s | of bf16's | verdict |", "| --- " * 6 + "|"]
    for form in (form for form in PRECISIONS if form in runs):
        run, other = runs[form], runs.get(CHECKED[form].against, {})
        off = fp8_is_off(form, runs)
        if off is None:
            reason = run.get("skipped") or run.get("failed") or "nothing to compare with"
            lines.append(
                f"| {CHECKED[form].title} |  |  |  |  | {str(reason).splitlines()[0].replace('|', '/')} |"
            )
            continue
        cells = []
        for key, shape in (("loss_of_last_step", ".4f"), ("tokens_per_second", ".0f")):
            cells += [f"{run[key]:{shape}}", f"{run[key] / other[key]:.4f}" if other[key] else ""]
        lines.append(f"| {' | '.join([CHECKED[form].title, *cells, '**off**' if off else 'right'])} |")
    return "\n".join(lines)


def _ratio(peak: int, other: Mapping[str, Any] | None) -> str:
    if other is None or "summary" not in other or not other["summary"]["peak_device_bytes"]:
        return ""
    return f"{peak / other['summary']['peak_device_bytes']:.3f}"


def truth_table(checks: Iterable[Mapping[str, Any]]) -> str:
    """Errors of the loss as Markdown."""
    lines = [
        "| objective | inputs | kernels | loss | dHidden | dHead | naive dHidden | naive dHead | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in checks:
        cells = [row["objective"], row["dtype"], "Triton" if row["triton"] else "PyTorch"]
        if row["skipped"]:
            cells += [*[""] * 5, f"skipped: {row['skipped']}"]
        else:
            errors = ("loss", "dhidden", "dhead", "naive_dhidden", "naive_dhead")
            cells += ["nan" if row[key] is None else f"{row[key]:.1e}" for key in errors]
            cells.append("right" if row["right"] else "**off**")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What was measured on."""
    import torch

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "gpus": [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices],
        "compute_capability": [f"{device.major}.{device.minor}" for device in devices],
        "cuda": torch.version.cuda,
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }


def page(record: Mapping[str, Any]) -> str:
    """The whole result as Markdown."""
    from bench.truth import GRADIENT_BOUNDS, LOSS_BOUND

    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    options = ", ".join(
        f"{key}={value}" for key, value in record["options"].items() if not isinstance(value, list)
    )
    bounds = ", ".join(f"gradients in {dtype} {bound:.1e}" for dtype, bound in GRADIENT_BOUNDS.items())
    return "\n".join(
        [
            f"# GPU check, {record['date']}",
            "",
            f"{'; '.join(record['machine']['gpus'])}; CUDA {record['machine']['cuda']}. {versions}. Commit {record['commit']}.",
            "",
            f"Options: {options}.",
            "",
            "## Peak memory of each form",
            "",
            "Peak of torch's allocator over the whole run, the most of any rank, building and loading included.",
            "",
            memory_table(record["runs"]),
            "",
            "## Transformer Engine's layers and Megatron's own",
            "",
            f"The largest difference of any step; right within {layer_kinds.LOSS_OF_LOCAL:.1e} of the loss and "
            f"{layer_kinds.NORM_OF_LOCAL:.1e} of the norm.",
            "",
            layer_kinds.table(record["runs"]),
            "",
            "## Outside FP8",
            "",
            outside_fp8.table(record["outside"]),
            "",
            "## Left behind",
            "",
            kept_list(record["kept"]),
            "",
            te_checkpoint.hint(Path("te_checkpoint")),
            "",
            "## The policy in FP8",
            "",
            f"Loss and speed of the last step beside the same run in bf16; right within {LOSS_OF_FP8:.0%} of its loss.",
            "",
            precision_table(record["runs"]),
            "",
            "## The loss against the dense fp64 oracle",
            "",
            f"Relative errors (gradients in norm), right within: loss {LOSS_BOUND:.0e}, {bounds}. Naive is the definition computed in",
            "the inputs' own dtype.",
            "",
            truth_table(record["truth"]),
            "",
            "## Conversion beside NeMo's own",
            "",
            "Each in a process of its own, imports and start included; the random model of the runs above.",
            "",
            nemo_convert.table(record["conversion"]),
            "",
        ]
    )


def anything_wrong(record: Mapping[str, Any]) -> bool:
    """Whether something failed or is further off than its bound."""
    runs, outside = record["runs"], record["outside"]
    return (
        any("failed" in one for part in (runs, outside, record["kept"]) for one in part.values())
        or any(fp8_is_off(form, runs) for form in PRECISIONS)
        or any(layer_kinds.is_off(form, runs) for form in LOCAL_FORMS)
        or any(outside_fp8.is_off(one) for one in outside.values() if "tensors" in one)
        or not all(one["right"] for one in record["truth"])
    )


def main(arguments: list[str]) -> int:
    """Measures and writes."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    refused = refusal(options.gpus)
    if refused is not None:
        print(refused, file=sys.stderr)
        return 2
    from bench.truth import checks

    from asft_nemo.run_dir import git_commit, versions

    options.out.mkdir(parents=True, exist_ok=True)
    wanted = {CHECKED[form].against for form in options.forms} | {"sft", *options.forms}
    with tempfile.TemporaryDirectory(prefix="asft-gpu-check-") as scratch:
        folder = Path(scratch)
        (folder / "model").mkdir()
        published = QWEN25_1P5B if options.shape else None
        make_model(folder / "model", hidden=options.hidden, layers=options.layers, published=published)
        examples = max(64, options.micro_batch_size * options.micro_batches * options.gpus)
        make_data(folder / "train.jsonl", examples=examples, sequence_length=options.sequence_length)
        runs = {form: measure(form, options, folder) for form in CHECKED if form in wanted}
        outside = look_outside(options, folder)
        kept = keep(options, folder)
        (folder / "conversion").mkdir()
        conversion = nemo_convert.measure(folder / "model" / "hf", folder / "conversion")
    found = checks(tokens=options.tokens, vocab=options.vocab, hidden=options.hidden, device="cuda")
    record = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "commit": git_commit(),
        "options": {key: value for key, value in vars(options).items() if key not in ("out", "name")},
        "runs": runs,
        "outside": outside,
        "kept": kept,
        "truth": [one.record() for one in found],
        "conversion": conversion,
    }
    (options.out / f"{options.name}.json").write_text(json.dumps(record, indent=2) + "\n")
    (options.out / f"{options.name}.md").write_text(page(record))
    log.info("%s", page(record))
    return int(anything_wrong(record))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
