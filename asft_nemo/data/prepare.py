"""Everything training needs of the data, from the run's settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from asft_nemo.config.model_shape import read_model_shape
from asft_nemo.config.schema import RunConfig
from asft_nemo.data.context_slices import segment_multiple
from asft_nemo.data.dataset import SupervisedDataset
from asft_nemo.data.fingerprint import fingerprint
from asft_nemo.data.loading import LoadReport
from asft_nemo.data.ordering import num_steps, order_words, training_order
from asft_nemo.data.packing import PackedDataset
from asft_nemo.data.tokenization import TextTokenizer
from asft_nemo.errors import DataError


@dataclass(frozen=True)
class Prepared:
    """The data of one run.

    Attributes:
        train: the training items; rows of several examples with `data.packing`.
        validation: held-out items, or None where `data.validation` is empty; their ids go on after the training rows.
        max_steps: optimizer steps of the whole run.
        fingerprint: SHA-256 over all files, the settings that shape items, and the tokenizer.
        summary: one line that says what there is and how it will be used.
    """

    train: SupervisedDataset | PackedDataset
    validation: SupervisedDataset | PackedDataset | None
    max_steps: int
    fingerprint: str
    summary: str


def prepare(run: RunConfig, *, tokenizer_dir: str | Path) -> Prepared:
    """Reads, tokenises and checks all files of a run. Deterministic: every rank prepares the same items.

    Args:
        run: the settings.
        tokenizer_dir: Hugging Face directory of the model, with tokenizer files and config.json.

    Raises:
        DataError: files, rows or the tokenizer are unusable, or nothing is left to train on.
    """
    data = run.data
    if not data.train:
        raise DataError("data.train is empty: set data.train=[file.jsonl]")
    tokenizer = TextTokenizer.load(tokenizer_dir)
    vocab_size = read_model_shape(tokenizer_dir).vocab_size
    train: SupervisedDataset | PackedDataset = SupervisedDataset.from_files(
        data.train, data, tokenizer=tokenizer, vocab_size=vocab_size
    )
    validation: SupervisedDataset | PackedDataset | None = None
    if data.validation:
        held_out = dataclasses.replace(data, templates=data.validation_templates)
        validation = SupervisedDataset.from_files(
            data.validation, held_out, tokenizer=tokenizer, vocab_size=vocab_size
        ).numbered_from(train.report.rows)
    if data.packing:
        multiple = segment_multiple(run.parallel.cp_size)
        train = PackedDataset(train, multiple_of=multiple)
        validation = None if validation is None else PackedDataset(validation, multiple_of=multiple)
    order = training_order(run, train)
    max_steps = num_steps(order, len(train), run.trainer, data)
    return Prepared(
        train=train,
        validation=validation,
        max_steps=max_steps,
        fingerprint=fingerprint([*data.train, *data.validation], data, tokenizer_dir=tokenizer_dir),
        summary=_summary(run, train, max_steps) + order_words(run, order, train, max_steps),
    )


def _summary(run: RunConfig, train: SupervisedDataset | PackedDataset, max_steps: int) -> str:
    report: LoadReport = train.report
    batch, what, packed = run.trainer.global_batch_size, "examples", ""
    if isinstance(train, PackedDataset):
        what = "rows"
        packed = f"packed into {len(train)} rows, {100 * train.efficiency:.1f} % of their places used; "
    left_out = {
        "bad": len(report.bad),
        "with evaluation questions": report.contaminated,
        "too long": report.too_long if run.data.on_too_long == "drop" else 0,
        "without a response after truncation": report.no_response_left,
    }
    dropped = ", ".join(f"{number} {why}" for why, number in left_out.items() if number)
    return (
        f"data: {report.rows} rows, {report.kept} examples{f' ({dropped}: left out)' if dropped else ''}, "
        f"{report.tokens} tokens, {100 * report.learned_tokens / report.tokens:.0f} % of them learned; {packed}"
        f"{max_steps} steps x {batch} {what} = {max_steps * batch / len(train):.2f} epochs"
    )
