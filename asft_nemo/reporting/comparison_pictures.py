"""Which pictures a comparison has, with their captions."""

from __future__ import annotations

from collections.abc import Mapping

from asft_eval.compare import Comparison
from asft_eval.drift_figures import forward_kls

from asft_nemo.reporting.comparison_plots import against_drift, bars, calibration, probabilities, shown
from asft_nemo.reporting.curves import LEARNING, pictures
from asft_nemo.reporting.runs import RunFiles

Section = list[tuple[str, str]]


def all_pictures(comparison: Comparison, runs: Mapping[str, RunFiles]) -> dict[str, Section]:
    """Heading -> pictures with captions; headings without a picture are left out.

    Args:
        comparison: its figures.
        runs: name -> the training that made the model.
    """
    names = shown(comparison)
    found = {
        "Suite by suite": [(bars(comparison), "Lines: 95 % intervals.")] if comparison.suites else [],
        "Drift": _drift(comparison, names),
        "Training": _training(names, runs),
    }
    return {heading: section for heading, section in found.items() if section}


def _drift(comparison: Comparison, names: list[str]) -> Section:
    drifts = {name: one for name, one in forward_kls(comparison.results).items() if name in names}
    readings = {
        name: result.drift["model"]
        for name, result in comparison.results.items()
        if result.drift is not None and name in names
    }
    section: Section = []
    if len(drifts) > 1 and comparison.columns:
        column = next(iter(comparison.means), comparison.suites[0])
        caption = "Up and to the left is better: right more often, and nearer to the base."
        section.append((against_drift(comparison, column, drifts), caption))
    if readings:
        section += [
            (calibration(names, readings), "Below the dotted line a model is surer than it is right. Tokens of the held-out text."),
            (probabilities(names, readings), "How probable the tokens of the held-out text are to each model."),
        ]  # fmt: skip
    return section


def _training(names: list[str], runs: Mapping[str, RunFiles]) -> Section:
    drawn = [name for name in names if name in runs]
    if not drawn:
        return []
    curves = pictures([runs[name] for name in drawn], LEARNING, [names.index(name) for name in drawn])
    return [(svg, curve.means) for curve, svg in curves]
