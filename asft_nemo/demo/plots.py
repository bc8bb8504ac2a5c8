"""The report's pictures as SVG text: learning against keeping, and the training dynamics.

Colours are Okabe and Ito's, told apart with every common colour blindness; lines also differ in their dashes and carry their
name at the end. Text stays text, so that the browser's own font draws it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from asft_nemo.demo.figures import Group, accuracy, old_accuracy
from asft_nemo.demo.verdict import TITLES
from asft_nemo.reporting.drawing import SIZE, STYLE, figure_of, name_ends, spread, svg_of

COLOURS = {"base": "#555555", "sft": "#D55E00", "dft": "#AA4499", "sft_kl": "#0072B2", "asft": "#007A5A"}
DASHES: dict[str, Any] = {
    "base": "-",
    "sft": (0, (5, 1.5)),
    "dft": (0, (1.2, 1.2)),
    "sft_kl": (0, (6, 1.5, 1.2, 1.5)),
    "asft": "-",
}
MARKERS = {"base": "D", "sft": "s", "dft": "^", "sft_kl": "v", "asft": "o"}

SMOOTHING = 7  # steps of the moving average

Series = Mapping[str, Sequence[Sequence[float]]]
"""objective -> one list of values a seed, a value a step."""


def trade_off(groups: Mapping[str, Group]) -> str:
    """New skill (x) against old skills (y), in per cent: the mean of every objective with its intervals, and every seed."""
    with matplotlib.rc_context(STYLE):
        figure, axes = figure_of((5.6, 3.7))
        points: list[tuple[float, float, float, str]] = []
        for name, group in groups.items():
            new, old, colour = accuracy(group, group.new_skill), old_accuracy(group), COLOURS[name]
            x, y = 100 * new.value, 100 * old.value
            axes.errorbar(
                x,
                y,
                xerr=[[max(0.0, x - 100 * new.low)], [max(0.0, 100 * new.high - x)]],
                yerr=[[max(0.0, y - 100 * old.low)], [max(0.0, 100 * old.high - y)]],
                color=colour,
                marker=MARKERS[name],
                markersize=8,
                elinewidth=1.2,
                capsize=0,
                zorder=3,
            )
            if len(group.models) > 1:
                axes.scatter(
                    [100 * v for v in new.per_seed],
                    [100 * v for v in old.per_seed],
                    color=colour,
                    marker=MARKERS[name],
                    s=16,
                    alpha=0.45,
                    linewidths=0,
                    zorder=2,
                )
            points.append((100 * new.low, 100 * new.high, y, name))
        axes.set_xlabel("new skill: right answers, %")
        axes.set_ylabel("old skills: right answers, %")
        axes.margins(0.12)
        _room(axes, 101.5)
        _name_points(axes, points)
        return svg_of(figure, "tradeoff", "New skill against old skills, per cent right, for every objective")


def dynamics(title: str, unit: str, series: Series, *, name: str, log: bool = False) -> str:
    """One quantity over the steps: the mean of the seeds, smoothed, with the range of the seeds behind it.

    Args:
        title: of the picture.
        unit: of the values; the label of the vertical axis.
        series: what is drawn.
        name: distinguishes this picture's ids from the other pictures'.
        log: logarithmic vertical axis; values that are not above zero are left out.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = figure_of(SIZE)
        ends: list[tuple[float, str, str]] = []
        for objective, seeds in series.items():
            smooth = np.array([_moving_average(values) for values in seeds])
            if log:
                smooth = np.where(smooth > 0, smooth, np.nan)
            steps = np.arange(1, smooth.shape[1] + 1)
            mean = smooth.mean(0)
            axes.plot(steps, mean, color=COLOURS[objective], linestyle=DASHES[objective], zorder=3)
            if len(seeds) > 1:
                low, high = smooth.min(0), smooth.max(0)
                axes.fill_between(
                    steps, low, high, color=COLOURS[objective], alpha=0.13, linewidth=0, zorder=1
                )
            ends.append((float(mean[-1]), TITLES[objective], COLOURS[objective]))
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0.0)
        last = max(len(seeds[0]) for seeds in series.values())
        axes.set_xlim(1, last)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        name_ends(axes, last, ends)
        return svg_of(figure, name, f"{title}, {unit}, over steps for {', '.join(TITLES[o] for o in series)}")


def _moving_average(values: Sequence[float]) -> np.ndarray:
    """Means over `SMOOTHING` steps around each step; fewer where steps are missing, and the first value stays itself."""
    data = np.asarray(values, dtype=float)
    reach = [min(SMOOTHING // 2, i) for i in range(len(data))]
    return np.array([data[i - r : i + r + 1].mean() for i, r in enumerate(reach)])


def _room(axes: Axes, most: float) -> None:
    """Per cent axes that do not suggest more than 100."""
    axes.set_xlim(right=min(axes.get_xlim()[1], most))
    axes.set_ylim(top=min(axes.get_ylim()[1], most))


def _name_points(axes: Axes, points: Sequence[tuple[float, float, float, str]]) -> None:
    """Names beyond the ends of the points' horizontal bars, on the side with more room, moved apart where they would touch.

    Args:
        axes: where.
        points: left end, right end, height, objective.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    places: list[tuple[float, float, float, str]] = []
    for low, high, y, name in points:
        (left_x, height), (right_x, _) = to_axes.transform([(low, y), (high, y)]).tolist()
        places.append((left_x, right_x, height, name))
    for right in (True, False):
        chosen = [place for place in places if (place[1] < 0.84) == right]
        heights = spread([height for _, _, height, _ in chosen], 0.062)
        for (low, high, _, name), height in zip(chosen, heights, strict=True):
            axes.annotate(
                TITLES[name],
                (high + 0.015 if right else low - 0.015, height),
                xycoords="axes fraction",
                ha="left" if right else "right",
                va="center",
                color=COLOURS[name],
                fontweight="bold",
                fontsize=10,
                zorder=4,
            )
