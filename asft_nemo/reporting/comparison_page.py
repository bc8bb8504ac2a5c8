"""comparison.html: results side by side on one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from asft_eval.compare import LEVEL, Comparison, Difference
from asft_eval.resampling import RESAMPLES
from asft_eval.told import Told, Written

from asft_nemo.reporting.html import document, escaped, row_of, table_of
from asft_nemo.reporting.numbers import nats, points, share, signed
from asft_nemo.reporting.page_style import CSS, RUNS_CSS

#: sections of pictures: heading -> (SVG, caption); empty where nothing can be drawn
Pictures = Mapping[str, Sequence[tuple[str, str]]]

_LONGEST_ANSWER = 80  # characters of what was read out of a completion
_MOST_NARROW = 5  # models that a phone's screen has columns for; tables of more scroll within the page

_CSS = """
.mark { font-weight: 650; } .better { color: var(--yes); } .worse { color: var(--no); }
.asked { border-left: 3px solid var(--line); padding-left: 12px; margin: 18px 0 26px; }
.asked h4 { margin: 0 0 6px; font-size: 15px; overflow-wrap: anywhere; }
td.words { overflow-wrap: anywhere; } summary { padding: 6px 0; overflow-wrap: anywhere; }
.notice { color: #3b2f00; }
h1, th { overflow-wrap: anywhere; } tbody th small { white-space: normal; }
"""


def comparison_page(
    comparison: Comparison, examples: Sequence[Told], pictures: Pictures, lacking: str
) -> str:
    """The whole page; refers to nothing outside itself.

    Args:
        comparison: its figures.
        examples: gained and lost.
        pictures: see `Pictures`.
        lacking: why pictures are missing, for the reader; empty where none is.
    """
    names = ", ".join(comparison.results)
    parts = [
        _header(comparison, names, lacking),
        _scores(comparison),
        _pictures(pictures, "Suite by suite"),
        _differences(comparison),
        _calibration(comparison),
        _drift(comparison, pictures),
        _pictures(pictures, "Training"),
        _examples(comparison, examples),
        _measured(comparison),
    ]
    return document(f"{names}: comparison", CSS + RUNS_CSS + _CSS, parts)


def _header(comparison: Comparison, names: str, lacking: str) -> str:
    first = next(iter(comparison.results))
    notices = [f"Not measured alike, compared by force: {text}." for text in comparison.warnings]
    if comparison.left_out:
        notices.append(f"Left out, because some result lacks them: {', '.join(comparison.left_out)}.")
    notices += [lacking] if lacking else []
    return (
        f'<header><p class="kind">asft compare: differences are to {escaped(first)}</p><h1>{escaped(names)}</h1></header>'
        + "".join(f'<p class="notice">{escaped(text)}</p>' for text in notices)
    )


def _key(number: int, name: str) -> str:
    return f'<span class="key" style="background:var(--run{number})"></span>{escaped(name)}'


def _heads(comparison: Comparison) -> list[str]:
    return [_key(number, name) for number, name in enumerate(comparison.results)]


def _cell(value: str, low: str, high: str, mark: str = "") -> str:
    return f"<td>{value}{mark}<small>{low} to {high}</small></td>"


def _mark(difference: Difference | None) -> str:
    if difference is None or not difference.mark:
        return ""
    kind, words = ("better", "better") if difference.value > 0 else ("worse", "worse")
    return f' <span class="mark {kind}" title="{words} than the first">{difference.mark}</span>'


def _scores(comparison: Comparison) -> str:
    if not comparison.suites:
        return ""
    rows: list[str] = []
    for column in comparison.columns:
        cells: list[str] = []
        for name in comparison.results:
            score = comparison.scores[name, column]
            mark = _mark(comparison.differences.get((name, column)))
            cells.append(_cell(share(score.value), share(score.low), share(score.high), mark))
        rows.append(row_of(_column(comparison, column), cells, own=column in comparison.means))
    caption = (
        f"Right answers in per cent; small: 95 % bootstrap intervals over examples (Wilson’s where all score alike). ▲ ▼: better or worse than "
        f"{escaped(next(iter(comparison.results)))}, adjusted p below {LEVEL:.2f} and interval of the difference without zero."
    )
    narrow = len(comparison.results) <= _MOST_NARROW
    return "<h2>Scores</h2>" + table_of(("", *_heads(comparison)), rows, caption, dense=narrow)


def _column(comparison: Comparison, column: str) -> str:
    members = comparison.means.get(column)
    if members is not None:
        return f"{_name(column)}<small>of {len(members)}</small>"
    figures = comparison.results[next(iter(comparison.results))].suites[column]
    return f"{_name(column)}<small>n = {figures.n}</small>"


def _name(column: str) -> str:
    """SUITE@PROTOCOL may be broken before the protocol."""
    return escaped(column).replace("@", "<wbr>@")


def _differences(comparison: Comparison) -> str:
    if not comparison.differences:
        return ""
    rows: list[str] = []
    for (name, column), one in comparison.differences.items():
        change = comparison.changes.get((name, column))
        counts = ("–", "–") if change is None else [_count(x, one.n) for x in (change.gained, change.lost)]
        cells = [
            _cell(points(one.value), points(one.low), points(one.high), _mark(one)),
            *(f"<td>{count}</td>" for count in counts),
            f"<td>{_p(one.p)}<small>{_p(one.p_adjusted)}</small></td>",
        ]
        rows.append(
            row_of(f"{_name(column)}<small>{_key(list(comparison.results).index(name), name)}</small>", cells)
        )
    caption = (
        f"Paired by example. Difference in points with its 95 % bootstrap interval ({RESAMPLES:,} resamples); examples gained and lost, in full or in "
        "part; p of a two-sided sign-flip test, small: adjusted by Holm over all models and suites (means of suites among themselves)."
    )
    heads = ("", "Difference", "Gained", "Lost", "p")
    return "<h2>Differences</h2>" + table_of(heads, rows, caption, dense=True)


def _count(number: int, n: int) -> str:
    return f"{number}<small>{share(number / n)} %</small>"


def _p(value: float) -> str:
    return "&lt;0.001" if value < 0.001 else f"{value:.3f}"


def _calibration(comparison: Comparison) -> str:
    found = comparison.calibration_table()
    if found is None:
        return ""
    (_, *suites), by_model = found
    rows = [
        row_of(_name(suite), [f"<td>{row[column]}</td>" for row in by_model])
        for column, suite in enumerate(suites, start=1)
    ]
    caption = (
        "Expected calibration error of multiple choice over ten bins: how far the chosen letter’s probability among the letters is from how often it "
        "is right."
    )
    narrow = len(comparison.results) <= _MOST_NARROW
    return "<h2>Calibration</h2>" + table_of(("", *_heads(comparison)), rows, caption, dense=narrow)


def _drift(comparison: Comparison, pictures: Pictures) -> str:
    drifts = {name: found for name, result in comparison.results.items() if (found := result.drift)}
    if not drifts:
        return ""
    three = lambda value: f"{value:.3f}"  # noqa: E731
    forms: list[tuple[str, str, Callable[[float], str]]] = [
        ("forward_kl", "KL(ref||<wbr>policy)", nats),
        ("reverse_kl", "KL(policy||<wbr>ref)", nats),
        ("nll_change", "Change of nll", lambda value: signed(value, 3)),
        ("nll", "nll", three),
        ("entropy", "Entropy", three),
    ]
    every = [{**found["model"], **found} for found in drifts.values()]
    rows = [row_of(words, [_optional(one.get(key), form) for one in every]) for key, words, form in forms]
    rows.append(row_of("Perplexity", [f"<td>{one['perplexity']:.2f}</td>" for one in every]))
    rows.append(row_of("ECE", [f"<td>{one['calibration']['ece']:.3f}</td>" for one in every]))
    any_one = next(iter(drifts.values()))
    caption = (
        f"Over {any_one['tokens']:,} tokens of {any_one['text']['texts']:,} held-out texts, full vocabulary, in nats per token; small: 95 % bootstrap "
        "intervals over texts. ECE: how far the probability of the most probable token is from how often it is right."
    )
    order = list(comparison.results)
    heads = ("", *(_key(order.index(name), name) for name in drifts))
    narrow = len(drifts) <= _MOST_NARROW
    table = table_of(heads, rows, caption, dense=narrow)
    return "<h2>Drift</h2>" + table + _grid(pictures.get("Drift", ()))


def _optional(interval: Mapping[str, Any] | None, form: Callable[[float], str]) -> str:
    if interval is None:
        return "<td>–</td>"
    return _cell(*(form(interval[bound]) for bound in ("value", "low", "high")))


def _pictures(pictures: Pictures, heading: str) -> str:
    grid = _grid(pictures.get(heading, ()))
    return f"<h2>{heading}</h2>{grid}" if grid else ""


def _grid(drawn: Sequence[tuple[str, str]]) -> str:
    alone = ' class="single"' if len(drawn) == 1 else ""
    figures = "".join(
        f"<figure{alone}>{svg}<figcaption>{escaped(caption)}</figcaption></figure>" for svg, caption in drawn
    )
    return figures if alone else f'<div class="pictures">{figures}</div>' if figures else ""


def _examples(comparison: Comparison, examples: Sequence[Told]) -> str:
    if not examples:
        return ""
    first = next(iter(comparison.results))
    parts = ["<h2>Gained and lost, to read</h2>"]
    for (model, suite), group in groupby(examples, key=lambda one: (one.model, one.suite)):
        change = comparison.changes[model, suite]
        title = f"{model}, {suite}: some of {change.gained} gained and {change.lost} lost"
        told = "".join(_example(one, first) for one in group)
        parts.append(f"<details><summary>{escaped(title)}</summary>{told}</details>")
    return "".join(parts)


def _example(one: Told, first: str) -> str:
    kind, verb = ("better", "gained") if one.difference > 0 else ("worse", "lost")
    return (
        f'<div class="asked"><h4><span class="{kind}">{verb}</span> {escaped(one.id)}</h4>'
        f"<pre>{escaped(one.prompt)}</pre><p>Right answer:</p><pre>{escaped(one.answer)}</pre>"
        f"{_wrote(first, one.first)}{_wrote(one.model, one.own)}</div>"
    )


def _wrote(who: str, one: Written) -> str:
    verdict = "right" if one.correct else "wrong"
    read = f", read as {one.parsed[:_LONGEST_ANSWER]}" if one.parsed else ""
    return f"<p>{escaped(who)} ({verdict}: {escaped(one.reason)}{escaped(read)}):</p><pre>{escaped(one.completion)}</pre>"


def _measured(comparison: Comparison) -> str:
    facts: list[tuple[str, str]] = []
    for name, result in comparison.results.items():
        versions = ", ".join(f"{package} {version}" for package, version in result.versions.items())
        facts.append((name, f"{result.model['path']}, {result.backend}, {versions}"))
    first = next(iter(comparison.results.values()))
    for suite in comparison.suites:
        one = first.suites[suite]
        how = one.protocol
        drawn = (
            f"{how.n} at temperature {how.temperature:g}, top_p {how.top_p:g}"
            if how.temperature
            else "greedy"
        )
        facts.append(
            (
                suite,
                f"version {one.version}, prompt {one.prompt}, {how.name}, {drawn}, at most {how.max_tokens} tokens, {one.sha256[:12]}",
            )
        )
    listed = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>" for name, text in facts)
    return f'<h2>How it was measured</h2><dl class="facts">{listed}</dl>'
