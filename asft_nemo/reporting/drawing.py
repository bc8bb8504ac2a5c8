"""How this project's pages draw: one look for all pictures, names at the ends of lines, a figure as SVG text."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, GRID = "#222222", "#666666", "#e3e3e3"

SIZE = (4.9, 3.1)  # inches; 72 SVG units each

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # for measuring only, see `svg_of`
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "text.color": INK,
    "lines.linewidth": 1.8,
}


def figure_of(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """An empty picture of `size`, in inches."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places moved apart to at least `gap` from each other, about where they were; in any order, answered in that order."""
    order = np.argsort(places, kind="stable")
    spread = [float(places[i]) for i in order]
    for _ in range(200):
        moved = False
        for i in range(len(spread) - 1):
            lack = gap - (spread[i + 1] - spread[i])
            if lack > 1e-9:
                spread[i] -= lack / 2
                spread[i + 1] += lack / 2
                moved = True
        if not moved:
            break
    answer = [0.0] * len(spread)
    for place, i in zip(spread, order, strict=True):
        answer[i] = place
    return answer


def name_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names right of the lines' ends, moved apart where they would touch.

    Args:
        axes: where.
        x: of the ends.
        ends: height, name, colour of each line.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((x, y))[1]) for y, _, _ in ends]
    for height, (_, name, colour) in zip(spread(heights, 0.085), ends, strict=True):
        axes.annotate(
            name,
            (1.02, height),
            xycoords="axes fraction",
            va="center",
            color=colour,
            fontweight="bold",
            fontsize=9.5,
        )


def svg_of(figure: Figure, name: str, label: str) -> str:
    """The figure as an SVG element: scalable, labelled, without metadata, its ids distinct from other figures'."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', text)
    # The reader's own sans serif: DejaVu, with which the room was measured, is wider than most.
    text = re.sub(
        r"'DejaVu Sans'(, sans-serif)?",
        "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif",
        text,
    )
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1),
        count=1,
    )
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
