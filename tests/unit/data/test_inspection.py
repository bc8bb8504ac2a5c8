"""What the check counts: lengths, what is learned, duplicates, reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asft_nemo.config.schema import DataConfig, FieldsConfig
from asft_nemo.data import SupervisedDataset, TextTokenizer
from asft_nemo.data.duplicates import Digests, Places
from asft_nemo.data.inspection import histogram, inspect_files, quantile

Writer = Callable[..., Path]
FIELDS = FieldsConfig(prompt="q", response="a")


def config(**settings: object) -> DataConfig:
    return DataConfig(template="raw", fields=FIELDS, **settings)  # type: ignore[arg-type]


def row(prompt: str, response: str) -> dict[str, str]:
    return {"q": prompt, "a": response}


@pytest.mark.parametrize("on_too_long", ["drop", "truncate"])
@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_counts_are_those_of_the_data_set(
    gpt2: TextTokenizer, jsonl: Writer, on_too_long: str, loss_on: str
) -> None:
    rows = [row("the quick brown fox " * n, "An answer: " * (7 - n)) for n in range(1, 7)]
    data = config(sequence_length=60, on_too_long=on_too_long, loss_on=loss_on)
    path = jsonl(*rows, row("the quick brown fox " * 50, "x"))
    found = inspect_files([path], data, tokenizer=gpt2).total().summary()
    report = SupervisedDataset.from_files([path], data, tokenizer=gpt2).report.summary()
    assert {key: found[key] for key in report} == report
    assert found["learned_share"] == pytest.approx(report["learned_tokens"] / report["tokens"], abs=1e-4)
    assert report["too_long"] > 0


def test_each_entry_is_counted_and_has_its_template(gpt2: TextTokenizer, jsonl: Writer) -> None:
    one = jsonl(row("a", "b"), row("c", "d"), name="one.jsonl")
    two = jsonl(row("a", "b"), "oops", name="two.jsonl")
    data = config(templates=("raw", "alpaca"))
    found = inspect_files([one, two], data, tokenizer=gpt2, show=1)
    assert [(entry.name, entry.rows, entry.bad) for entry in found.entries] == [("one", 2, 0), ("two", 2, 1)]
    assert max(found.entries[0].lengths) < min(found.entries[1].lengths)
    assert [(Path(shown.file).name, shown.line) for shown in found.shown] == [
        ("one.jsonl", 1),
        ("two.jsonl", 1),
    ]
    assert found.total().rows == 4


def test_duplicates_are_found_across_files(gpt2: TextTokenizer, jsonl: Writer) -> None:
    one = jsonl(row("p", "1"), row("q", "1"), "oops", row("p", "1"), name="one.jsonl")
    two = jsonl("", row("p", "2"), row("q", "1"), row("p", "2"), name="two.jsonl")
    twins = inspect_files([one, two], config(), tokenizer=gpt2).duplicates
    assert twins is not None
    assert (twins.exact, twins.same_prompt) == (3, 1)
    assert twins.exact_places == [
        (f"{one}:4", f"{one}:1"),
        (f"{two}:3", f"{one}:2"),
        (f"{two}:4", f"{two}:2"),
    ]
    assert twins.same_prompt_places == [(f"{two}:2", f"{one}:1")]


def test_reasons_that_differ_in_numbers_are_one(gpt2: TextTokenizer, jsonl: Writer) -> None:
    path = jsonl({"q": 1, "a": "x"}, '{"q": ', '{"q":   ', row("p", "1"))
    kinds = inspect_files([path], config(), tokenizer=gpt2).reasons()
    assert [(kind.reason, kind.rows, kind.first.line) for kind in kinds] == [
        ("not JSON: Expecting value at column ...", 2, 2),
        ("field 'q' is number where text is needed", 1, 1),
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "é", "", "ab"]), max_size=30))
def test_digests_name_the_first_equal_row(texts: list[str]) -> None:
    digests = Digests()
    for text in texts:
        digests.add(text)
    assert digests.first_rows().tolist() == [texts.index(text) for text in texts]


def test_places_name_the_file() -> None:
    places = Places()
    for place in [("a", 1), ("a", 4), ("b", 2), ("a", 9)]:
        places.add(*place)
    assert [places[row] for row in range(4)] == ["a:1", "a:4", "b:2", "a:9"]


LENGTHS = st.lists(st.integers(2, 5000) | st.integers(2, 60), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(3, 4000))
def test_bins_hold_every_row_once_and_end_at_the_bound(lengths: list[int], bound: int) -> None:
    bins = histogram(Counter(lengths), bound)
    assert sum(found.rows for found in bins) == len(lengths)
    assert bins[-1].last == max(lengths)
    for found in bins:
        assert found.rows == sum(found.first <= length <= found.last for length in lengths)
        assert found.last <= bound or found.first > bound
    assert all(one.last + 1 == two.first for one, two in pairwise(bins))
    assert len(bins) <= 16


@settings(max_examples=30, deadline=None)
@given(LENGTHS)
def test_quantiles_are_numpys(lengths: list[int]) -> None:
    counted = Counter(lengths)
    for share in (0.0, 0.5, 0.95, 1.0):
        expected = np.percentile(lengths, 100 * share, method="inverted_cdf")
        assert quantile(counted, share) == expected
