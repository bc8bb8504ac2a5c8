"""The curves of runs over their steps, one picture for each quantity that some run has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from asft_nemo.reporting.drawing import FAINT, GRID, INK, SIZE, STYLE, figure_of, name_ends, svg_of
from asft_nemo.reporting.runs import RunFiles

MOST_POINTS = 400  # of a line; more than a picture has room for are drawn as means with the range of what they stand for

# Okabe and Ito's, told apart with every common colour blindness, on light paper; lines of later runs are dashed, too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A8A00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), "-", (0, (5, 1.5)))
MOST_RUNS = len(COLOURS)
_ALARM = "#cc0000"
_LONGEST_NAME = 14  # beside the end of a line

#: what the page's style sheet says instead, so that pictures follow the reader's light or dark paper
_THEME = {INK: "var(--ink)", FAINT: "var(--soft)", GRID: "var(--line)", _ALARM: "var(--no)"}
_THEME |= {colour.lower(): f"var(--run{number})" for number, colour in enumerate(COLOURS)}


@dataclass(frozen=True)
class Curve:
    """One picture.

    Attributes:
        key: in metrics.jsonl.
        title: of the picture.
        unit: of the values.
        means: what the curve says, for the caption.
        scale: the values are divided by it.
        log: logarithmic axis, where all values are above zero.
    """

    key: str
    title: str
    unit: str
    means: str
    scale: float = 1.0
    log: bool = False


LEARNING = (
    Curve("loss", "Loss", "nats per token", "What is minimised; runs of other objectives have another scale."),
    Curve("nll", "Negative log likelihood", "nats per token", "How surprised the model is by the training responses; comparable between objectives."),
    Curve("validation_nll", "Validation: negative log likelihood", "nats per token", "The same on the validation files."),
    Curve("weighted_nll", "Weighted negative log likelihood", "nats per token", "The objective's first term.", log=True),
    Curve("kl", "KL(ref||policy)", "nats per token", "How far the policy has gone from the base, on training tokens."),
    Curve("kl_reverse", "KL(policy||ref)", "nats per token", "How far the policy has gone from the base, on training tokens."),
    Curve("validation_kl", "Validation: KL(ref||policy)", "nats per token", "The same on the validation files."),
    Curve("token_weight", "Mean token weight", "weight", "What a token's loss is multiplied with: the label's probability for DFT and ASFT."),
    Curve("high_weight_share", "Share of tokens of high weight", "share", "Tokens whose weight is above 0.9: the model knew them already."),
    Curve("topk_entropy", "Top-k entropy", "nats", "Of the most probable tokens, where the objective reads it."),
    Curve("lr", "Learning rate", "", "As the optimizer used it."),
    Curve("grad_norm", "Gradient norm", "before clipping", "Of all parameters; a gap is a step that was skipped.", log=True),
)  # fmt: skip
SPEED = (
    Curve("tokens_per_second", "Tokens per second", "of all ranks", "Tokens that count, of the global batch."),
    Curve("seconds", "Seconds per step", "s", "The whole step, its reference included."),
    Curve("reference_seconds", "Seconds of the reference", "s", "Of them: the frozen models' passes ahead of the step."),
    Curve("mfu", "Model FLOPs utilisation", "%", "The policy's share of what the GPU can do.", scale=0.01),
    Curve("tflops_per_gpu", "Policy's speed", "TFLOP/s per GPU", "Forward and backward, without the reference's."),
    Curve("cache_hit_rate", "Cache hit rate", "%", "Rows of the reference that came from the cache.", scale=0.01),
    Curve("memory_bytes", "Peak device memory", "GiB", "The most that the writing rank's allocator has held so far.", scale=2**30),
)  # fmt: skip


def pictures(
    runs: Sequence[RunFiles], curves: Sequence[Curve], numbers: Sequence[int] | None = None
) -> list[tuple[Curve, str]]:
    """The curves that some run has values for, as SVG.

    Args:
        runs: a line each.
        curves: a picture each.
        numbers: of the runs' colours; None = the first ones.
    """
    numbers = range(len(runs)) if numbers is None else numbers
    drawn = []
    for curve in curves:
        series = [values_of(run, curve) for run in runs]
        if any(len(steps) for steps, _ in series):
            drawn.append((curve, _picture(curve, runs, series, numbers)))
    return drawn


def values_of(run: RunFiles, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values where the run has a number: older runs lack keys, and what is not finite is null."""
    pairs = [(line["step"], line[curve.key]) for line in run.steps if line.get(curve.key) is not None]
    steps = np.array([step for step, _ in pairs], dtype=float)
    return steps, np.array([value for _, value in pairs], dtype=float) / curve.scale


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Means of equal shares of the steps, and the lowest and highest value in each; all values where there is room for them.

    Returns:
        steps, means, lowest, highest, at most `MOST_POINTS` each.
    """
    if len(steps) <= MOST_POINTS:
        return steps, values, values, values
    parts = np.array_split(np.arange(len(steps)), MOST_POINTS)
    each = [values[part] for part in parts]
    return (
        np.array([steps[part].mean() for part in parts]),
        np.array([one.mean() for one in each]),
        np.array([one.min() for one in each]),
        np.array([one.max() for one in each]),
    )


def _picture(
    curve: Curve,
    runs: Sequence[RunFiles],
    series: Sequence[tuple[np.ndarray, np.ndarray]],
    numbers: Sequence[int],
) -> str:
    with matplotlib.rc_context({**STYLE, "savefig.transparent": True}):
        figure, axes = figure_of(SIZE)
        ends: list[tuple[float, str, str]] = []
        for number, run, (steps, values) in zip(numbers, runs, series, strict=True):
            if len(steps):
                _line(axes, steps, values, number)
                ends.append((float(values[-1]), short(run.name), COLOURS[number]))
        _axes(axes, curve, series)
        for number, run in zip(numbers, runs, strict=True):
            _marks(axes, run, COLOURS[number])
        if len(runs) > 1:
            name_ends(axes, axes.get_xlim()[1], ends)
        label = f"{curve.title}{', ' if curve.unit else ''}{curve.unit}, over steps"
        svg = svg_of(figure, curve.key.replace("_", ""), label)
    return themed(svg)


def themed(svg: str) -> str:
    """A picture in the colours of the page that it stands on, whose style sheet has `RUNS_CSS`."""
    for colour, variable in _THEME.items():  # matplotlib writes colours in lower case
        svg = svg.replace(colour, variable)
    return svg


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, number: int) -> None:
    where, means, low, high = thinned(steps, values)
    single = "o" if len(where) == 1 else ""
    axes.plot(where, means, color=COLOURS[number], linestyle=DASHES[number], marker=single, zorder=3)
    if low is not means:
        axes.fill_between(where, low, high, color=COLOURS[number], alpha=0.2, linewidth=0, zorder=2)


def _axes(axes: Axes, curve: Curve, series: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    axes.set_title(curve.title)
    axes.set_xlabel("step")
    axes.set_ylabel(curve.unit)
    every = np.concatenate([values for _, values in series])
    if curve.log and (every > 0).all() and every.max() > 10 * every.min():
        axes.set_yscale("log")
    elif (every >= 0).all():
        axes.set_ylim(bottom=0.0)
    first = min(steps[0] for steps, _ in series if len(steps))
    last = max(steps[-1] for steps, _ in series if len(steps))
    axes.set_xlim(first, max(last, first + 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))


def _marks(axes: Axes, run: RunFiles, colour: str) -> None:
    """Where the run was resumed: dotted lines; where an alarm was sounded: red marks at the upper edge."""
    for step in run.resumed_after:
        axes.axvline(step, color=colour, linestyle=":", linewidth=1, alpha=0.8, zorder=1)
    # the step that ended a run is behind its last one
    alarmed = [alarm["step"] for alarm in run.alarms if alarm["step"] <= run.steps[-1]["step"] + 1]
    if alarmed:
        axes.set_xlim(right=max(axes.get_xlim()[1], *alarmed))
        axes.plot(
            alarmed, [0.985] * len(alarmed), "v", color=_ALARM, markersize=6, zorder=4,
            transform=axes.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip


def short(name: str) -> str:
    """A run's name where there is little room: its end, which is where runs of one kind differ."""
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]
