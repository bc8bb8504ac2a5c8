"""Rules about the data section, rows of the table of `asft_nemo.config.rules`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from asft_nemo.config.facts import Facts, Level, Rule
from asft_nemo.config.tables import CHOICES


def _packing(facts: Facts) -> Iterator[str]:
    run = facts.run
    if not run.data.packing:
        return
    if run.trainer.micro_batch_size != 1:
        yield (
            f"data.packing=true with trainer.micro_batch_size={run.trainer.micro_batch_size}: a packed row is a micro batch already, and "
            "Transformer Engine takes one: set trainer.micro_batch_size=1"
        )
    if run.reference.micro_batch_size not in (None, 1):
        yield "reference.micro_batch_size cannot be used with data.packing=true, where a packed row is a micro batch: leave it out"


def _validation(facts: Facts) -> Iterator[str]:
    data, every = facts.run.data, facts.run.trainer.validate_every
    if data.validation and every is None:
        yield (
            "data.validation does nothing without trainer.validate_every: set trainer.validate_every=<steps>"
        )
    if every is not None and not data.validation:
        yield f"trainer.validate_every={every} has nothing to measure: set data.validation=[file.jsonl]"


def _fields(facts: Facts) -> Iterator[str]:
    fields = facts.run.data.fields
    pair = {"prompt": fields.prompt, "response": fields.response}
    missing = [name for name, value in pair.items() if value is None]
    if fields.messages is not None and (len(missing) < 2 or fields.input is not None):
        yield "data.fields.messages names a whole conversation: leave out data.fields.prompt, input and response"
    elif len(missing) == 1 or (missing and fields.input is not None):
        names = " and ".join(f"data.fields.{name}" for name in missing)
        yield f"data.fields names some fields and not the others: set {names} too"


def _templates(facts: Facts) -> Iterator[str]:
    data, known = facts.run.data, CHOICES["data.template"]
    for key, names, files, entries in (
        ("templates", data.templates, "train", data.train),
        ("validation_templates", data.validation_templates, "validation", data.validation),
    ):
        unknown = [name for name in names if name not in known]
        if unknown:
            yield f"data.{key} names {', '.join(unknown)}: choose from {', '.join(known)}"
        if names and len(names) != len(entries):
            yield (
                f"data.{key} has {_entries(names)} and data.{files} {len(entries)}: name one template for each entry of "
                f"data.{files}, or leave data.{key} out to use data.template for all"
            )


def _entries(values: Sequence[object]) -> str:
    return f"{len(values)} {'entry' if len(values) == 1 else 'entries'}"


def _weights(facts: Facts) -> Iterator[str]:
    data = facts.run.data
    if not data.weights:
        for key in ("weights_by", "when_exhausted"):
            if facts.asked(f"data.{key}", least=Level.COMMAND_LINE):
                yield f"data.{key} does nothing without data.weights: leave it out, or set data.weights"
        return
    if len(data.weights) != len(data.train):
        yield (
            f"data.weights has {_entries(data.weights)} and data.train {len(data.train)}: give one weight for each entry of "
            "data.train"
        )
    elif len(data.train) == 1:
        yield "data.weights has nothing to blend, for data.train has one entry: leave data.weights out"
    for place, weight in enumerate(data.weights):
        if not (math.isfinite(weight) and weight > 0):
            file = f" of {data.train[place]}" if place < len(data.train) else ""
            yield (
                f"data.weights gives {weight:g} as the weight{file}: give a number above 0, or leave the file out of data.train"
            )
    if facts.run.trainer.max_steps is not None and facts.asked(
        "data.when_exhausted", least=Level.COMMAND_LINE
    ):
        yield "data.when_exhausted does nothing with trainer.max_steps, which says how long to train: leave one of them out"


def _group_by_length(facts: Facts) -> Iterator[str]:
    run, layout = facts.run, facts.run.parallel
    if not run.data.group_by_length:
        return
    vpp = "whose messages go both ways at once (Megatron takes the lengths of one for those of the other)"
    others = (
        (
            run.data.packing,
            "data.packing=true",
            "which leaves no padding to save",
            "set one of them to false",
        ),
        (bool(run.data.weights), "data.weights", "which have an order of their own", "leave one of them out"),
        (
            layout.cp_size > 1,
            f"parallel.cp_size={layout.cp_size}",
            "which cuts rows of one length",
            "set parallel.cp_size=1",
        ),
        (
            layout.vpp_size is not None,
            f"parallel.vpp_size={layout.vpp_size}",
            vpp,
            "set parallel.vpp_size=null",
        ),
        (
            run.reference.micro_batch_size not in (None, run.trainer.micro_batch_size),
            f"reference.micro_batch_size={run.reference.micro_batch_size}",
            "which joins micro batches of different lengths",
            "leave it out",
        ),
    )
    for clashes, setting, why, cure in others:
        if clashes:
            yield f"data.group_by_length=true does not go with {setting}, {why}: {cure}"


DATA: tuple[Rule, ...] = (_packing, _validation, _fields, _templates, _weights, _group_by_length)
