"""report.html of training runs: curves, alarms, settings, versions; one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asft_nemo.reporting.curves import LEARNING, SPEED, Curve, pictures
from asft_nemo.reporting.html import document, escaped, row_of, table_of
from asft_nemo.reporting.page_style import CSS, RUNS_CSS
from asft_nemo.reporting.runs import RunFiles

MOST_ALARMS = 50  # of a run in the table
_LAST = ("nll", "kl", "kl_reverse", "token_weight", "grad_norm", "tokens_per_second", "mfu")


def last_values(run: RunFiles) -> dict[str, Any]:
    """The run in short: what --json prints, and the first table shows."""
    last = run.steps[-1]
    return {
        "name": run.name,
        "folder": str(run.folder),
        "step": last["step"],
        "max_steps": run.max_steps,
        "finished": last["step"] == run.max_steps,
        "resumed_after": run.resumed_after,
        "skipped_steps": sum(bool(line.get("skipped")) for line in run.steps),
        "seconds": sum(line["seconds"] for line in run.steps),
        "tokens": sum(line["tokens"] for line in run.steps),
        "last": {key: last.get(key) for key in _LAST},
        "alarms": list(run.alarms),
    }


def run_page(runs: Sequence[RunFiles]) -> str:
    """The whole page; refers to nothing outside itself."""
    names = ", ".join(run.name for run in runs)
    parts = [
        _header(runs, names),
        _overview(runs),
        _alarms(runs),
        _section("Learning", runs, LEARNING),
        _section("Speed and memory", runs, SPEED),
        _settings(runs),
    ]
    return document(f"{names}: training", CSS + RUNS_CSS, parts)


def _header(runs: Sequence[RunFiles], names: str) -> str:
    finished = sum(bool(last_values(run)["finished"]) for run in runs)
    kind = "finished" if finished == len(runs) else "some finished" if finished else "not finished"
    return (
        f'<header><p class="kind">asft report: training, {kind}</p><h1>{escaped(names)}</h1></header>'
        '<p class="small">Every value is of one step’s global batch, as in metrics.jsonl. Dotted lines: resumed behind this step. Red marks: '
        "alarms. Where a run has more steps than a picture has room for, a line is the mean of neighbouring steps and its band their range.</p>"
    )


def _key(number: int, run: RunFiles) -> str:
    return f'<span class="key" style="background:var(--run{number})"></span>{escaped(run.name)}'


def _overview(runs: Sequence[RunFiles]) -> str:
    """A column for each run: on a phone there is room for the names of a few runs, not for the names of all values."""
    names = ("Step", "nll", "KL", "Gradient norm", "Tokens/s", "Time in steps", "Alarms")
    columns = zip(*(_overview_of(run) for run in runs), strict=True)
    rows = [
        row_of(name, [f"<td>{cell}</td>" for cell in cells])
        for name, cells in zip(names, columns, strict=True)
    ]
    head = ("", *(_key(number, run) for number, run in enumerate(runs)))
    return "<h2>Where it is</h2>" + table_of(
        head, rows, "Values of the last step; – is one that the run does not have."
    )


def _overview_of(run: RunFiles) -> list[str]:
    values = last_values(run)
    last = values["last"]
    return [
        f"{values['step']} of {values['max_steps'] or 'unknown'}",
        _number(last["nll"]),
        _number(last["kl"] if last["kl"] is not None else last["kl_reverse"]),
        _number(last["grad_norm"]),
        "–" if last["tokens_per_second"] is None else f"{last['tokens_per_second']:,.0f}",
        _hours(values["seconds"]),
        str(len(run.alarms)),
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _alarms(runs: Sequence[RunFiles]) -> str:
    rows = [
        f"<tr><th scope=row>{alarm['step']}</th><td class=words>{escaped(alarm.get('kind', ''))}</td>"
        f"<td class=words>{escaped(alarm.get('text', ''))}</td>"
        + (f"<td class=words>{_key(number, run)}</td></tr>" if len(runs) > 1 else "</tr>")
        for number, run in enumerate(runs)
        for alarm in run.alarms[-MOST_ALARMS:]
    ]
    if not rows:
        return "<h2>Alarms</h2><p>None.</p>"
    left_out = sum(max(0, len(run.alarms) - MOST_ALARMS) for run in runs)
    caption = (
        f"The last {MOST_ALARMS} of a run; {left_out} earlier ones are in alarms.jsonl." if left_out else ""
    )
    return "<h2>Alarms</h2>" + table_of(("Step", "Kind", "What", "Run")[: 3 + (len(runs) > 1)], rows, caption)


def _section(title: str, runs: Sequence[RunFiles], curves: Sequence[Curve]) -> str:
    drawn = pictures(runs, curves)
    if not drawn:
        return ""
    figures = "".join(
        f"<figure>{svg}<figcaption>{escaped(curve.means)}</figcaption></figure>" for curve, svg in drawn
    )
    return f'<h2>{title}</h2><div class="pictures">{figures}</div>'


def _settings(runs: Sequence[RunFiles]) -> str:
    """What the runs were told: in short, whatever is not the same in all of them, and versions."""
    parts = []
    if len(runs) > 1:
        parts.append("<h2>What differs</h2>" + _differences(runs))
    for number, run in enumerate(runs):
        heading = _key(number, run) if len(runs) > 1 else "Settings and versions"
        parts.append(f"<h2>{heading}</h2>{_facts(run)}")
    return "".join(parts)


def _differences(runs: Sequence[RunFiles]) -> str:
    flat = [_flat(run.record["config"]) for run in runs]
    keys = [key for key in dict.fromkeys(k for one in flat for k in one) if key != "run.dir"]
    rows = [
        row_of(escaped(key), [f"<td>{escaped(_shown(one.get(key)))}</td>" for one in flat])
        for key in keys
        if len({_shown(one.get(key)) for one in flat}) > 1
    ]
    if not rows:
        return "<p>No setting but run.dir.</p>"
    return table_of(("", *(_key(number, run) for number, run in enumerate(runs))), rows, "")


def _facts(run: RunFiles) -> str:
    record, config = run.record, run.record["config"]
    layout, batch = config["parallel"], config["trainer"]
    sizes = ", ".join(
        f"{name.removesuffix('_size').upper()} {layout[name]}"
        for name in ("tp_size", "pp_size", "vpp_size", "cp_size")
        if layout.get(name)
    )
    facts = [
        ("recipe", config["recipe"] + (f", experiment {config['experiment']}" if config.get("experiment") else "")),
        ("objective", f"{config['objective']['name']}, kl_weight {config['objective']['kl_weight']:g}; reference {config['reference']['form']}"),
        ("model", config["model"]["path"]),
        ("data", ", ".join(config["data"]["train"])),
        ("layout", f"{sizes} on {config['run']['world_size']} ranks, {config['precision']}"),
        ("batch", f"{batch['global_batch_size']} in micro batches of {batch['micro_batch_size']}, sequence length {config['data']['sequence_length']}"),
        ("optimizer", f"lr {config['optim']['lr']:g}, {config['optim']['schedule']}, seed {config['run']['seed']}"),
        ("starts", "; ".join(_start(start) for start in run.starts) or "not recorded"),
        ("versions", ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items() if version)),
        ("commit", record.get("git_commit") or "not a checkout"),
    ]  # fmt: skip
    listed = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>" for name, text in facts)
    every = "\n".join(
        f"{key}={_shown(value)}" for key, value in _flat(config).items() if not key.startswith("cluster.")
    )
    return (
        f'<dl class="facts">{listed}</dl>'
        f"<details><summary>All settings</summary><pre>{escaped(every)}</pre></details>"
    )


def _start(start: Mapping[str, Any]) -> str:
    job = f", Slurm job {start['slurm_job']}" if start.get("slurm_job") else ""
    return f"{start['time']} at step {start['step']} on {start['host']}{job}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
