"""The pictures of a comparison: a bar a model and suite, accuracy against drift, calibration, the labels' probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from asft_eval.compare import Comparison
from asft_eval.resampling import Interval
from matplotlib.axes import Axes

from asft_nemo.reporting.curves import COLOURS, DASHES, MOST_RUNS, short, themed
from asft_nemo.reporting.drawing import FAINT, INK, SIZE, STYLE, figure_of, svg_of

_BAR = 0.19  # inches
_MARKERS = "DsovP^"

Drift = Mapping[str, Any]
_Drawer = Callable[[Axes], None]


def shown(comparison: Comparison) -> list[str]:
    """The models that pictures have: as many as colours tell apart."""
    return list(comparison.results)[:MOST_RUNS]


def bars(comparison: Comparison) -> str:
    """Accuracy of every model in every suite, in per cent, with 95 % intervals."""
    names, columns = shown(comparison), comparison.columns
    size = (SIZE[0], 0.75 + _BAR * len(columns) * (len(names) + 1))

    def draw(axes: Axes) -> None:
        for number, name in enumerate(names):
            places = [row * (len(names) + 1) + number for row in range(len(columns))]
            found = [comparison.scores[name, column] for column in columns]
            axes.barh(
                places,
                [100 * one.value for one in found],
                height=0.86,
                color=COLOURS[number],
                xerr=_reach(found, 100),
                error_kw={"ecolor": INK, "elinewidth": 1.1},
            )
        middles = [row * (len(names) + 1) + (len(names) - 1) / 2 for row in range(len(columns))]
        axes.set_yticks(middles, [column.replace("@", "\n@") for column in columns])
        axes.set_xlabel("right, %")
        axes.set_xlim(0, 100)
        axes.set_ylim(middles[-1] + len(names) / 2 + 0.3, -0.8)
        axes.grid(visible=False, axis="y")

    return _picture(size, draw, "suites", "Right answers in per cent, a bar a model, suite by suite")


def against_drift(comparison: Comparison, column: str, drifts: Mapping[str, Interval]) -> str:
    """Accuracy over KL(ref||policy) for the models whose drift is known.

    Args:
        comparison: for the accuracies.
        column: suite or mean whose accuracy is drawn.
        drifts: model -> KL in nats per token.
    """

    def draw(axes: Axes) -> None:
        for number, name in enumerate(shown(comparison)):
            if name not in drifts:
                continue
            score, drift = comparison.scores[name, column], drifts[name]
            axes.errorbar(
                [drift.value],
                [100 * score.value],
                xerr=_reach([drift], 1),
                yerr=_reach([score], 100),
                color=COLOURS[number],
                marker=_MARKERS[number],
                markersize=8,
                elinewidth=1.2,
            )
            axes.annotate(
                short(name),
                (drift.value, 100 * score.value),
                xytext=(6, 6),
                textcoords="offset points",
                color=COLOURS[number],
                fontweight="bold",
                fontsize=9.5,
            )
        axes.set_xlabel("KL(ref||policy), nats per token")
        axes.set_ylabel(f"right, %: {column}")
        axes.margins(0.18)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))

    return _picture(SIZE, draw, "drift", f"Right answers in per cent, {column}, over KL(ref||policy)")


def calibration(names: Sequence[str], readings: Mapping[str, Drift]) -> str:
    """Share of most probable tokens that are the text's, over the probability they were given; the diagonal is honest.

    Args:
        names: all models, for their colours.
        readings: model -> its reading of the text.
    """

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=":")
        for name, reading in readings.items():
            number = names.index(name)
            bins = [one for one in reading["calibration"]["bins"] if one["tokens"]]
            axes.plot(
                [one["confidence"] for one in bins],
                [one["accuracy"] for one in bins],
                color=COLOURS[number],
                linestyle=DASHES[number],
                marker=_MARKERS[number],
                markersize=4,
            )
        axes.set_xlabel("probability of the most probable token")
        axes.set_ylabel("how often it is the text's")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)

    return _picture(
        SIZE, draw, "calibration", "How often the most probable token is right, over its probability"
    )


def probabilities(names: Sequence[str], readings: Mapping[str, Drift]) -> str:
    """Histogram of the probability that each model gives to the text's tokens."""

    def draw(axes: Axes) -> None:
        for name, reading in readings.items():
            number, histogram = names.index(name), reading["label_probability"]
            axes.stairs(
                100 * np.array(histogram["shares"]),
                histogram["edges"],
                color=COLOURS[number],
                linestyle=DASHES[number],
                linewidth=1.7,
            )
        axes.set_xlabel("probability of the text's token")
        axes.set_ylabel("tokens, %")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)

    return _picture(
        SIZE, draw, "probability", "Share of tokens over the probability that the model gives them"
    )


def _reach(found: Sequence[Interval], scale: float) -> np.ndarray:
    """How far the bounds lie below and above the values, `[2, n]`."""
    below = [max(0.0, one.value - one.low) for one in found]
    above = [max(0.0, one.high - one.value) for one in found]
    return scale * np.array([below, above])


def _picture(size: tuple[float, float], draw: _Drawer, name: str, label: str) -> str:
    with matplotlib.rc_context({**STYLE, "savefig.transparent": True}):
        figure, axes = figure_of(size)
        draw(axes)
        return themed(svg_of(figure, name, label))
