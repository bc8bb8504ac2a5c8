"""What the runs of `bench.gpu_forms` come to: tables, and which of them are off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench import layer_kinds
from bench.gpu_forms import CHECKED, PRECISIONS
from bench.gpu_parts import cell

MIB = 2**20
LOSS_OF_FP8, STEPS_OF_FP8 = (
    0.01,
    50,
)  # of bf16's loss after the last step, and the fewest steps that it is a bound for
_BYTES = {
    "policy parameters": "policy_parameter_bytes",
    "reference on device": "reference_device_bytes",
    "in host memory": "reference_host_bytes",
    "on disk": "reference_disk_bytes",
    "hidden states kept": "reference_hidden_bytes",
}
Runs = Mapping[str, Mapping[str, Any]]


def memory_table(runs: Runs) -> str:
    """Peaks of all forms as Markdown, with the ratio to sft's and to the form it is compared with."""
    head = ["form", "peak, MiB", "of sft's", "of its own sft's", *(f"{title}, MiB" for title in _BYTES)]
    lines = ["| " + " | ".join([*head, "KL at step 0"]) + " |", "| --- " * (len(head) + 1) + "|"]
    for form, run in runs.items():
        cells = [CHECKED[form].title]
        if "summary" not in run:
            reason = run.get("skipped") or f"failed: {run['failed']}"
            lines.append("| " + " | ".join([cells[0], cell(reason), *[""] * (len(head) - 1)]) + " |")
            continue
        peak = run["summary"]["peak_device_bytes"]
        cells.append(f"{peak / MIB:.1f}")
        cells += [_ratio(peak, runs.get(measure)) for measure in ("sft", CHECKED[form].against)]
        cells += [f"{run['summary'][key] / MIB:.1f}" for key in _BYTES.values()]
        kl = run["kl_at_step_0"]
        lines.append("| " + " | ".join([*cells, "" if kl is None else f"{kl:.2e}"]) + " |")
    return "\n".join(lines)


def _ratio(peak: int, other: Mapping[str, Any] | None) -> str:
    if other is None or "summary" not in other or not other["summary"]["peak_device_bytes"]:
        return ""
    return f"{peak / other['summary']['peak_device_bytes']:.3f}"


def distance_of_fp8(form: str, runs: Runs) -> float | None:
    """How far a policy in FP8 ended from bf16's loss, relative; None where one of the two is not there, or has too few steps to say."""
    own, other = runs.get(form, {}), runs.get(CHECKED[form].against, {})
    if "losses" not in own or "losses" not in other or _too_few_steps(form, runs):
        return None
    return abs(own["losses"][-1] - other["losses"][-1]) / abs(other["losses"][-1])


def _too_few_steps(form: str, runs: Runs) -> str | None:
    """Says so where both runs are there, and are shorter than the bound is meant for."""
    steps = [len(runs.get(one, {}).get("losses", ())) for one in (form, CHECKED[form].against)]
    return f"fewer than {STEPS_OF_FP8} steps" if 0 < min(steps) < STEPS_OF_FP8 else None


def fp8_is_off(form: str, runs: Runs) -> bool | None:
    """Whether that is more than `LOSS_OF_FP8`, or no number; None where there is nothing to judge by."""
    distance = distance_of_fp8(form, runs)
    return None if distance is None else not distance <= LOSS_OF_FP8


def precision_table(runs: Runs) -> str:
    """Policies in FP8 as Markdown, each with the ratios to the same run in bf16."""
    lines = ["| policy | loss | of bf16's | tokens/s | of bf16's | verdict |", "| --- " * 6 + "|"]
    for form in (form for form in PRECISIONS if form in runs):
        run, other = runs[form], runs.get(CHECKED[form].against, {})
        off, few = fp8_is_off(form, runs), _too_few_steps(form, runs)
        if off is None and few is None:
            reason = run.get("skipped") or run.get("failed") or "nothing to compare with"
            lines.append(f"| {CHECKED[form].title} |  |  |  |  | {cell(reason)} |")
            continue
        cells = []
        for key, shape in (("loss_of_last_step", ".4f"), ("tokens_per_second", ".0f")):
            cells += [f"{run[key]:{shape}}", f"{run[key] / other[key]:.4f}" if other[key] else ""]
        verdict = few or ("**off**" if off else "right")
        lines.append(f"| {' | '.join([CHECKED[form].title, *cells, verdict])} |")
    return "\n".join(lines)


def form_bars(runs: Runs) -> dict[str, dict[str, Any]]:
    """What the bars of the forms are judged by."""
    bars: dict[str, dict[str, Any]] = {}
    for form in PRECISIONS:
        distance = distance_of_fp8(form, runs)
        few = _too_few_steps(form, runs)
        bars[f"loss_{form}"] = {"reason": few} if few else _bar(distance, LOSS_OF_FP8, form, runs)
    for form in layer_kinds.LOCAL_FORMS:
        losses, norms = layer_kinds.differences(form, runs) or (None, None)
        bars[f"loss_{form}"] = _bar(losses, layer_kinds.LOSS_OF_LOCAL, form, runs)
        bars[f"norm_{form}"] = _bar(norms, layer_kinds.NORM_OF_LOCAL, form, runs)
    failed = [form for form, run in runs.items() if "failed" in run]
    bars["failed"] = {"measured": len(failed), "limit": 0}
    return bars


def _bar(measured: float | None, limit: float, form: str, runs: Runs) -> dict[str, Any]:
    if measured is not None:
        return {"measured": measured, "limit": limit}
    run = runs.get(form, {})
    return {"reason": run.get("skipped") or run.get("failed") or "one of the two runs is not there"}


def forms_table(found: Mapping[str, Any]) -> str:
    """All of it as Markdown."""
    runs = found["runs"]
    return "\n".join(
        [
            "Peak memory of torch's allocator, the most of any rank:",
            "",
            memory_table(runs),
            "",
            "Transformer Engine's layers and Megatron's own, the largest difference of any step; right within "
            f"{layer_kinds.LOSS_OF_LOCAL:.1e} of the loss and {layer_kinds.NORM_OF_LOCAL:.1e} of the norm:",
            "",
            layer_kinds.table(runs),
            "",
            f"The policy in FP8, loss and speed of the last step beside the same run in bf16; right within {LOSS_OF_FP8:.0%} of its loss "
            f"after {STEPS_OF_FP8} steps or more:",
            "",
            precision_table(runs),
        ]
    )


def kept_list(found: Mapping[str, Any]) -> str:
    """Where things were left, as Markdown."""
    lines = [f"* {what}: {next(iter(one.values()))}" for what, one in found["kept"].items()]
    return "\n".join([*lines, "", found["hint"]])
