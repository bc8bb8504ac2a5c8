"""report.html: one self-contained page drawn from report.json's values and the pictures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from asft_nemo.demo.plots import COLOURS
from asft_nemo.demo.stages import duration
from asft_nemo.demo.verdict import SIMILAR, TITLES
from asft_nemo.reporting.html import document, escaped, row_of, table_of
from asft_nemo.reporting.numbers import MINUS, nats, points, share, signed
from asft_nemo.reporting.page_style import CSS

Values = Mapping[str, Any]
MARKS = {"yes": "✓ holds", "no": "✗ fails", "undecided": "? undecided"}
STAGES = {
    "data": "data",
    "import": "import and round trip",
    "train": "fine-tuning",
    "export": "export",
    "measure": "measuring",
    "report": "report",
}


def page(values: Values, pictures: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        values: what report.json holds.
        pictures: SVG elements: `trade_off`, `nll`, `weighted_nll`, `kl`, `token_weight`.

    Returns:
        HTML that refers to nothing outside itself.
    """
    parts = [
        _header(values),
        _claims(values),
        _results(values, pictures["trade_off"]),
        _skills(values),
        _differences(values),
        _dynamics(values, pictures),
        _checks(values),
        _protocol(values),
        _limits(values),
    ]
    return document(values["headline"], CSS, parts)


def _interval(estimate: Values, form: Any) -> str:
    return f"{form(estimate['low'])} to {form(estimate['high'])}"


def _cell(estimate: Values, form: Any) -> str:
    if estimate["low"] == estimate["high"]:
        return f"<td>{form(estimate['value'])}</td>"
    return f"<td>{form(estimate['value'])}<small>{_interval(estimate, form)}</small></td>"


def _key(name: str) -> str:
    return f'<span class="key" style="background:{COLOURS[name]}"></span>{escaped(TITLES[name])}'


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


# --- sections


def _header(values: Values) -> str:
    protocol = values["protocol"]
    runs = len(protocol["objectives"]) * len(protocol["seeds"])
    kind = f"asft demo, {values['started'][:10]}: {runs} fine-tuning runs of {protocol['steps']} steps, all on this machine"
    notice = ""
    if values["quick"]:
        notice = (
            '<p class="notice">This is a quick run: it shows that every part works. With so few steps, tests and one seed '
            "its figures are no evidence; <code>asft demo</code> makes the comparison.</p>"
        )
    return (
        f'<header><p class="kind">{escaped(kind)}</p><h1>{escaped(values["headline"])}</h1>'
        f'<p class="lead">{escaped(values["details"])}</p>{notice}</header>'
    )


def _claims(values: Values) -> str:
    items = []
    for claim in values["claims"]:
        gap, in_points = claim["difference"], claim["unit"] == "points"
        form = points if in_points else (lambda value: signed(value, 3))
        unit = "points" if in_points else "nats per token"
        seeds = ""
        if len(gap["per_seed"]) > 1:
            seeds = f"; seed by seed {', '.join(form(v) for v in gap['per_seed'])}"
        bound = f" (bound {form(claim['bound'])})" if claim["bound"] else ""
        items.append(
            f'<li class="{claim["status"]}"><span class="mark">{MARKS[claim["status"]]}</span>'
            f"<span>{escaped(claim['text'])}<small>difference {form(gap['value'])} {unit}{bound}, "
            f"95 % interval {_interval(gap, form)}{seeds}</small></span></li>"
        )
    seeds = values["protocol"]["seeds"]
    every = f" and each of the {len(seeds)} training seeds are" if len(seeds) > 1 else " is"
    return (
        "<h2>The paper’s point, claim by claim</h2>"
        f"<p>A claim holds when the whole interval of its difference{every} above the bound (zero unless said), fails when all is "
        "below, and is undecided otherwise. The headline follows from these five and was not written by hand.</p>"
        f'<ul class="claims">{"".join(items)}</ul>'
    )


def _results(values: Values, picture: str) -> str:
    rows = []
    for name, model in values["models"].items():
        forgotten = "<td>–</td>"
        if model["forgotten"] is not None:
            forgotten = _cell(model["forgotten"], lambda v: points(v, sign=False).replace("-", MINUS))
        rows.append(
            row_of(
                _key(name),
                [
                    _cell(model["new"], share),
                    _cell(model["old"], share),
                    forgotten,
                    _cell(model["forward_kl"], nats),
                    _cell(model["reverse_kl"], nats),
                ],
                own=name == "asft",
            )
        )
    tests, text = values["skills"]["tests"], values["text"]
    seeds = len(values["protocol"]["seeds"])
    mean = f"Means of {seeds} seeds. " if seeds > 1 else "One seed. "
    dots = (
        "Large marks are means with 95 % intervals, small ones single seeds."
        if seeds > 1
        else "Bars are 95 % intervals."
    )
    old_tests = sum(tests[name] for name in values["skills"]["old"])
    caption = (
        f"{mean}New skill: {tests[values['skills']['new']]} tests. Old skills: mean over {len(values['skills']['old'])} skills, {old_tests} "
        f"tests. Forgotten: base minus model, in points, paired by test. KL to the base, nats per token, over the "
        f"{text['tokens']} response tokens of {text['texts']} held-out texts, full vocabulary. Small: 95 % intervals."
    )
    head = (
        "",
        "New skill, %",
        "Old skills, %",
        "Forgotten, points",
        "KL (ref||<wbr>policy)",
        "KL (policy||<wbr>ref)",
    )
    return (
        "<h2>Learned, forgotten, drifted</h2>"
        f'<figure class="single">{picture}<figcaption>Up and to the right is better. {dots}</figcaption></figure>'
        + table_of(head, rows, caption, dense=True)
    )


def _skills(values: Values) -> str:
    models, names = values["models"], values["skills"]
    rows = []
    for skill in (names["new"], *names["old"]):
        cells = [_cell(model["skills"][skill], share) for model in models.values()]
        label = f"{escaped(skill)}{' (new)' if skill == names['new'] else ''}<small>n = {names['tests'][skill]}</small>"
        rows.append(row_of(label, cells, own=skill == names["new"]))
    caption = "Right answers in per cent, exact match of greedy completions; small: Wilson’s 95 % interval for n tests."
    return "<h2>Every skill</h2>" + table_of(
        ["", *(_key(name) for name in models)], rows, caption, dense=True
    )


def _differences(values: Values) -> str:
    rows = []
    for pair in values["differences"]:
        cells = []
        for measure, form in (
            ("new", points),
            ("old", points),
            ("forward_kl", lambda value: signed(value, 3)),
        ):
            gap = pair[measure]
            shown = f"<b>{form(gap['value'])}</b>" if gap["clear"] else form(gap["value"])
            cells.append(f"<td>{shown}<small>{_interval(gap, form)}</small></td>")
        rows.append(row_of(f"{escaped(TITLES[pair['one']])} against {escaped(TITLES[pair['other']])}", cells))
    several = len(values["protocol"]["seeds"]) > 1
    rule = "the interval excludes zero" + (" and all seeds agree in sign" if several else "")
    caption = (
        f"Paired by test and by block of text; small: 95 % interval over tests or text. Bold: {rule}. A difference that is not "
        "bold is not shown to be there, which is not to say that it is zero."
    )
    return "<h2>Objective against objective</h2>" + table_of(
        ("", "New skill, points", "Old skills, points", "KL (ref||<wbr>policy), nats"), rows, caption
    )


def _dynamics(values: Values, pictures: Mapping[str, str]) -> str:
    captions = {
        "nll": "How surprised the model is by the training responses, right and wrong ones. It should not be pushed to zero here: "
        f"{100 * values['protocol']['wrong_share']:.0f} % of the answers are wrong.",
        "weighted_nll": "The first term of each objective. DFT and ASFT weigh a token by its probability, so theirs is far smaller than "
        "SFT’s; that is no sign of learning less.",
        "kl": "Measured only where the objective reads the reference; at the first step policy and reference are the same.",
        "token_weight": "One for SFT and SFT + KL; the probability of the label for DFT and ASFT.",
    }
    figures = "".join(
        f"<figure>{pictures[name]}<figcaption>{escaped(caption)}</figcaption></figure>"
        for name, caption in captions.items()
        if name in pictures
    )
    band = "; the bands are the range of the seeds" if len(values["protocol"]["seeds"]) > 1 else ""
    return (
        "<h2>Training dynamics</h2>"
        f"<p>Means over the valid tokens of each step’s global batch, smoothed over seven steps{band}.</p>"
        f'<div class="pictures">{figures}</div>'
    )


def _checks(values: Values) -> str:
    trip = values["round_trip"]
    first = [kl for row in values["training"].values() for kl in row["first_kl"] if kl is not None]
    exact = "exactly 0" if all(kl == 0 for kl in first) else f"at most {max(first):.2g} nats per token"
    items = [
        f"The base model went from Hugging Face to NeMo’s distributed checkpoint and back: all {trip['tensors']} tensors "
        f"({trip['bytes'] / 1e6:.1f} MB) returned bit for bit.",
        f"The weights of all {trip['exported_runs_identical']} exported models equal their checkpoints after rounding to the base’s dtype, "
        "and transformers loaded every one of them; the figures above come from those files.",
        f"Before the first update the KL to the frozen reference was {exact} in every run that has one.",
    ]
    return (
        "<h2>Checked on the way</h2><ul>" + "".join(f"<li>{escaped(item)}</li>" for item in items) + "</ul>"
    )


def _protocol(values: Values) -> str:
    p, evaluation = values["protocol"], values["protocol"]["evaluation"]
    seeds = ", ".join(str(seed) for seed in p["seeds"])
    facts = [
        (
            "base model",
            "assets/tiny-base, Qwen2 architecture, 2.6 million parameters, made for this demo (its README says how)",
        ),
        (
            "task",
            f"the new skill “{values['skills']['new']}”: {p['examples']} examples a seed, {100 * p['wrong_share']:.0f} % of whose answers are wrong; "
            "tests have right answers only and share no prompt with training (facts excepted, which can only be recalled)",
        ),
        ("objectives", _listed([TITLES[name] for name in p["objectives"]])),
        (
            "anchor",
            f"kl_weight {p['kl_weight']:g}, KL(ref||policy) over the full vocabulary; reference resident, run ahead of every step",
        ),
        (
            "steps",
            f"{p['steps']} of {p['global_batch_size']} examples in micro batches of {p['micro_batch_size']}, sequence length {p['sequence_length']}",
        ),
        (
            "optimizer",
            f"AdamW, lr {p['lr']:g}, {p['schedule']} with {100 * p['warmup_ratio']:.0f} % warm-up, weight decay {p['weight_decay']:g}, "
            f"gradient norm clipped at {p['clip_grad']:g}; the same for all objectives",
        ),
        ("seeds", f"{seeds}: each draws its own examples, wrong answers and order"),
        (
            "layout",
            f"TP {p['tp_size']} × PP {p['pp_size']} on {p['world_size']} gloo ranks, {p['precision']}, loss {p['loss']}",
        ),
        (
            "evaluation",
            f"exported weights in the base’s bf16, computed in fp32 by transformers; {evaluation['protocol']}, at most {evaluation['max_tokens']} tokens, exact match",
        ),
        ("seconds a step", _step_seconds(values)),
        ("seconds a stage", _stage_seconds(values)),
        ("machine", _machine(values["machine"])),
        (
            "versions",
            ", ".join(f"{name} {version}" for name, version in values["versions"].items() if version),
        ),
        ("commit", values["git_commit"] or "not a checkout"),
    ]
    rows = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>" for name, text in facts)
    commands = "\n\n".join(shlex.join(words) for words in p["commands"].values())
    return (
        f'<h2>Protocol</h2><dl class="facts">{rows}</dl>'
        "<p>The runs as a user would type them in the folder of this report (with another run.dir):</p>"
        f"<pre>{escaped(commands)}</pre>"
    )


def _step_seconds(values: Values) -> str:
    words = []
    for name, row in values["training"].items():
        ahead = row["reference_seconds_a_step"]
        share = f", {ahead:.2f} of it the reference" if row["first_kl"][0] is not None else ""
        words.append(f"{TITLES[name]} {row['seconds_a_step']:.2f}{share}")
    return "; ".join(words) + " (medians; four ranks share this machine’s cores, so nothing follows for GPUs)"


def _stage_seconds(values: Values) -> str:
    seconds = values["seconds"]
    words = ", ".join(f"{STAGES[name]} {value:.0f}" for name, value in seconds.items())
    return f"{words}; {duration(sum(seconds.values()))} in all"


def _machine(machine: Values) -> str:
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB of memory, "
        f"{machine['system']}, Python {machine['python']}"
    )


def _limits(values: Values) -> str:
    seeds, wrong = len(values["protocol"]["seeds"]), values["protocol"]["wrong_share"]
    items = [
        "A model of 2.6 million parameters in a made-up world. That the same would happen at 7B is what the paper is about, not what "
        "this page shows.",
        f"The task was chosen so that the objectives can differ: {100 * wrong:.0f} % of the training answers are wrong. With clean answers "
        "the differences are small; what was measured while choosing is in assets/tiny-base/FINE_TUNING.md.",
        "Learning rate, steps and kl_weight are the same for all objectives, chosen in rehearsals of this comparison and not tuned for "
        "each. Another setting can change the order.",
        "Intervals cover the choice of tests and text. "
        + (
            f"{seeds} seeds show roughly how much the training draw matters; they are too few for an interval."
            if seeds > 1
            else "One seed says nothing of how much the training draw matters."
        ),
        "Greedy decoding and exact match only: no sampling, no partial credit. The KL is averaged over eight kinds of short text "
        "from the base’s own world, not over text at large.",
        f"“About as well” means at most {100 * SIMILAR:.0f} points behind; the margin is generous and fixed in the code.",
        "Seconds on this machine say nothing about cost on GPUs.",
    ]
    return (
        "<h2>What these numbers do not show</h2><ul>"
        + "".join(f"<li>{escaped(item)}</li>" for item in items)
        + "</ul>"
    )
