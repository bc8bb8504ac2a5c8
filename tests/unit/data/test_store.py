"""What is put into a part comes out of it, however it was cut into chunks."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from asft_nemo.data.store import Part, PartWriter, chunk_of, spans_of

masks = st.lists(st.booleans(), min_size=1, max_size=9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(masks, max_size=4), max_size=5), st.integers(1, 10))
def test_examples_come_out_as_they_went_in(chunks: list[list[list[bool]]], most: int) -> None:
    rng = np.random.default_rng(0)
    examples = [
        [(rng.integers(0, 1 << 31, len(mask)).astype(np.int32), np.asarray(mask)) for mask in chunk]
        for chunk in chunks
    ]
    with tempfile.TemporaryDirectory() as folder:
        writer = PartWriter(Path(folder) / "unfinished", source=(1, 2))
        for chunk in examples:
            # Every second row is a bad one.
            places = [(2 * i, 10 + i) for i in range(len(chunk))]
            bad = [(row + 1, 0, "why\nnot") for row, _ in places]
            writer.append(chunk_of(2 * len(chunk), chunk, places, bad, []))
        writer.finish(Path(folder) / "parts" / "key")
        part = Part(Path(folder) / "parts" / "key")
        flat = [example for chunk in examples for example in chunk]
        assert part.lengths().tolist() == [len(tokens) for tokens, _ in flat]
        assert part.index[:, 2].tolist() == list(range(0, 2 * len(flat), 2))
        assert list(part.left_out("bad_rows.txt")) == [(2 * i + 1, 0, "why\nnot") for i in range(len(flat))]
        for first in (0, 1):
            counted = [int(learned[first:most].sum()) for _, learned in flat]
            assert part.learned_within(most, first=first).tolist() == counted
        for place, (tokens, learned) in enumerate(flat):
            found = part.example(place, most)
            assert found[0].tolist() == tokens[:most].tolist()
            assert found[1].tolist() == learned[:most].tolist()


@settings(max_examples=40)
@given(st.lists(masks))
def test_spans_are_the_runs_of_each_mask(examples: list[list[bool]]) -> None:
    lengths = [len(mask) for mask in examples]
    flat = np.asarray([on for mask in examples for on in mask], dtype=bool)
    spans, counts = spans_of(flat, np.cumsum([0, *lengths])[: len(examples)])
    for mask, runs in zip(examples, np.split(spans, np.cumsum(counts)), strict=False):
        assert [i for start, stop in runs for i in range(start, stop)] == [
            i for i, on in enumerate(mask) if on
        ]
        assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(runs.tolist()))
