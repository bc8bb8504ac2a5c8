"""From measurements to the JSON's numbers, a table, verdicts on the bars, and a plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "megatron-core", "nvidia-modelopt", "liger-kernel", "triton", "numpy", "matplotlib")
MIB = 2**20

TITLES = {
    "authors": "(a) authors' arithmetic",
    "fused": "ours, fused_linear_loss",
    "vocab_parallel": "ours, vocab_parallel_loss",
    "liger": "(b) Liger-Kernel, Triton",
    "liger_chunked": "(b) Liger-Kernel, chunked PyTorch, CE unweighted",
    "modelopt": "(c) ModelOpt KL + Megatron CE",
    "fused_sft": "ours, fused_linear_loss, objective sft",
}


@dataclass(frozen=True)
class Bar:
    """A promise: at this size, `contender`'s `quantity` is at most `limit` of `baseline`'s."""

    quantity: str
    contender: str
    baseline: str
    limit: float
    hidden: int
    dtype: str | None = None
    tokens: int | None = None
    vocab: int | None = None

    def applies(self, case: dict[str, Any]) -> bool:
        """Whether a measured size is the one the promise is about."""
        wanted = {"tokens": self.tokens, "vocab": self.vocab, "hidden": self.hidden, "dtype": self.dtype}
        asked = case["objective"] == "asft"
        return asked and all(value is None or case[key] == value for key, value in wanted.items())


BARS = (
    Bar("bytes", "fused", "authors", 1 / 8, hidden=512, dtype="fp32", tokens=4096, vocab=32768),
    Bar("bytes", "fused", "authors", 1 / 5, hidden=512, dtype="bf16", tokens=4096, vocab=32768),
    Bar("seconds", "fused", "authors", 0.85, hidden=512, dtype="fp32", tokens=4096, vocab=32768),
    Bar("seconds", "fused", "fused_sft", 1.50, hidden=2048),
)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(seconds: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """name -> spread of its seconds over the baseline's, round by round."""
    if baseline not in seconds:
        return {}
    return {
        name: spread([mine / its for mine, its in zip(values, seconds[baseline], strict=True)])
        for name, values in seconds.items()
    }


def verdicts(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per bar and measured size it is about: what was measured and whether it holds."""
    found: list[dict[str, Any]] = []
    for bar in BARS:
        for result in results:
            if not bar.applies(result["case"]):
                continue
            if bar.quantity == "seconds":
                measured = ratios(result["seconds"], bar.baseline).get(bar.contender, {}).get("median")
            else:
                mine, its = (
                    result["memory"].get(name, {}).get("bytes") for name in (bar.contender, bar.baseline)
                )
                measured = mine / its if mine is not None and its else None
            if measured is not None:
                entry = {"quantity": bar.quantity, "contender": bar.contender, "baseline": bar.baseline}
                met = measured <= bar.limit
                found.append(
                    {**entry, "case": result["case"], "limit": bar.limit, "ratio": measured, "met": met}
                )
    return found


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    answer = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None


def environment() -> dict[str, Any]:
    """Machine, versions and date. Names no host and no path."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "versions": versions,
        "commit": _commit(),
    }


def idle_share(seconds: float = 1.0) -> float:
    """Share of all cores' time that nothing used while this waits: 1 where the machine is left alone."""

    def ticks() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split()[1:9]]
        return fields[3] + fields[4], sum(fields)

    idle, total = ticks()
    time.sleep(seconds)
    idle_after, total_after = ticks()
    return round((idle_after - idle) / max(total_after - total, 1), 2)


def size_label(case: dict[str, Any]) -> str:
    """T, V, H and dtype of a case in one phrase."""
    return f"T={case['tokens']} V={case['vocab']} H={case['hidden']} {case['dtype']}"


def _row(result: dict[str, Any], name: str, title: str) -> str:
    memory = result["memory"].get(name, {})
    baseline = result["memory"].get("authors", {}).get("bytes")
    skipped = result["skipped"].get(name)
    if skipped:
        return f"| {title} | skipped: {skipped} | | | | | |"
    cells = [title]
    if name in result["seconds"]:
        took = spread(result["seconds"][name])
        cells.append(f"{took['median']:.3f} ({took['min']:.3f} to {took['max']:.3f})")
        ratio = ratios(result["seconds"], "authors").get(name)
        cells.append(f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "")
        cpu = result.get("cpu_seconds", {}).get(name)
        cells.append(f"{sum(cpu) / sum(result['seconds'][name]):.2f}" if cpu else "")
    else:
        cells += ["", "", ""]
    extra = memory.get("bytes")
    cells.append("" if extra is None else f"{extra / MIB:.0f}")
    cells.append("" if extra is None or not baseline else f"{extra / baseline:.3f}")
    errors = result["gradient_errors"].get(name)
    cells.append("" if errors is None else f"{errors['dhidden_TH']:.1e}, {errors['dhead_VH']:.1e}")
    return "| " + " | ".join(cells) + " |"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a table a size, then the bars."""
    lines: list[str] = []
    for result in results:
        case = result["case"]
        lines += [
            f"### {size_label(case)}, objective {case['objective']}, chunk {result['chunk_tokens']} tokens",
            "",
            "| contender | seconds, median (min to max) | over (a), per round | cores busy | extra MiB | over (a) | "
            "gradient error: dHidden, dHead |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(_row(result, name, TITLES[name]) for name in result["names"]),
            "",
        ]
    bars = verdicts(results)
    if bars:
        lines += ["| bar | size | at most | measured | |", "| --- | --- | --- | --- | --- |"]
    for bar in bars:
        what = f"{bar['quantity']}, {bar['contender']} over {bar['baseline']}"
        verdict = "met" if bar["met"] else "**missed**"
        lines.append(
            f"| {what} | {size_label(bar['case'])} | {bar['limit']:.3f} | {bar['ratio']:.3f} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Seconds and extra memory of every contender at every size, in horizontal bars on log scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in TITLES if any(name in result["seconds"] for result in results)]
    labels = [f"{size_label(result['case'])}, {result['case']['objective']}" for result in results]
    height = 0.8 / max(len(names), 1)
    figure, axes = pyplot.subplots(
        1, 2, figsize=(13, 1.5 + 0.9 * len(results)), sharey=True, layout="constrained"
    )
    for number, name in enumerate(names):
        where = [row + (number + 0.5) * height - 0.4 for row in range(len(results))]
        took = [statistics.median(result["seconds"].get(name) or [float("nan")]) for result in results]
        extra = [result["memory"].get(name, {}).get("bytes", float("nan")) / MIB for result in results]
        axes[0].barh(where, took, height * 0.9, label=TITLES[name])
        axes[1].barh(where, extra, height * 0.9)
    axes[0].set(xscale="log", xlabel="seconds, forward + backward (median)", yticks=range(len(results)))
    axes[0].set_yticklabels(labels)
    axes[0].invert_yaxis()
    axes[1].set(xscale="log", xlabel="peak extra memory, MiB")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize="small")
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
