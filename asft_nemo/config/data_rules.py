"""Rules about the data section, rows of the table of `asft_nemo.config.rules`."""

from __future__ import annotations

from collections.abc import Iterator

from asft_nemo.config.facts import Facts, Rule
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
                f"data.{key} has {len(names)} entries and data.{files} {len(entries)}: name one template for each entry of "
                f"data.{files}, or leave data.{key} out to use data.template for all"
            )


DATA: tuple[Rule, ...] = (_packing, _validation, _fields, _templates)
