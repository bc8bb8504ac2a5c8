"""report.json and report.html: complete, equal to each other, and needing nothing from outside."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from unit.demo.made_up import groups

from asft_nemo.config.load import compose
from asft_nemo.demo import plan, plots, report
from asft_nemo.demo.page import nats, page, points
from asft_nemo.demo.plan import Entry
from asft_nemo.demo.run import PICTURES
from asft_nemo.demo.verdict import judge
from asft_nemo.reporting.drawing import spread
from asft_nemo.run_dir import versions

VOID = {"meta", "br", "hr", "img", "link", "input", "wbr"}


def metrics(steps: int, *, kl: bool) -> list[dict[str, Any]]:
    return [
        {
            "step": i + 1,
            "nll": 3.0 - 0.1 * i,
            "weighted_nll": 2.0 / (i + 1),
            "kl": 0.01 * i if kl else None,
            "token_weight": 0.7,
            "seconds": 0.25,
            "reference_seconds": 0.05 if kl else 0.0,
            "tokens": 100,
        }
        for i in range(steps)
    ]


@pytest.fixture(scope="module")
def values_and_pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, str]]:
    chosen, found = plan.QUICK, groups()
    folder = tmp_path_factory.mktemp("a folder") / "it's <here>"
    plan.write_data(chosen, folder / "data")
    entry = Entry("asft", 0)
    data = plan.training_file(folder / "data", 0)
    from asft_nemo.config.paths import project_dir

    words = plan.words(
        chosen, entry, model=project_dir() / "assets" / "tiny-base", data=data, run_dir=folder / "run"
    )
    lines = {"sft": [metrics(9, kl=False)] * 2, "asft": [metrics(9, kl=True)] * 2}
    values = {
        "format": report.FORMAT,
        "quick": True,
        "started": "2030-01-02T03:04:05+00:00",
        **report.measurements(found, judge(found)),
        "training": report.training(lines),
        "round_trip": {"identical": True, "tensors": 51, "bytes": 5_000_000, "exported_runs_identical": 2},
        "protocol": report.protocol(chosen, compose(words), {"asft": words}),
        "machine": report.machine(),
        "versions": versions(),
        "git_commit": "abc<script>",
        "seconds": {"data": 1.0, "train": 61.0, "report": 2.0},
    }
    pictures = {"trade_off": plots.trade_off(found)}
    for name, (title, unit, log) in PICTURES.items():
        pictures[name] = plots.dynamics(title, unit, report.series(lines, name), name=name, log=log)
    return values, pictures


@pytest.fixture(scope="module")
def html(values_and_pictures: tuple[dict[str, Any], dict[str, str]]) -> str:
    return page(*values_and_pictures)


class Reader(HTMLParser):
    """Collects text, tags and addresses; fails on tags that are not closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "poster"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def test_the_page_is_well_formed_and_refers_to_nothing_outside(html: str):
    read = Reader(html)
    assert not read.open
    assert all(address.startswith("#") for address in read.addresses)
    assert {address[1:] for address in read.addresses} <= set(read.ids)
    assert len(read.ids) == len(set(read.ids))
    assert not {"script", "link", "img", "iframe", "object"} & set(read.tags)
    assert read.tags.count("svg") == 5
    assert not re.search(r"@import|url\((?!#)", html)
    assert not [found for found in re.findall(r"https?://[^\"' ]+", html) if "www.w3.org" not in found]


def test_names_with_special_characters_stay_text(html: str):
    assert "abc<script>" not in html
    assert "abc&lt;script&gt;" in html


def test_numbers_and_verdict_are_on_the_page(
    html: str, values_and_pictures: tuple[dict[str, Any], dict[str, str]]
):
    values, _ = values_and_pictures
    text = " ".join(" ".join(Reader(html).words).split())
    assert values["headline"] in text
    assert values["details"] in text
    assert text.count("✓ holds") == 5
    for model in values["models"].values():
        for measure in ("new", "old"):
            assert f"{100 * model[measure]['value']:.1f}" in text
            assert f"{100 * model[measure]['low']:.1f} to {100 * model[measure]['high']:.1f}" in text
        assert nats(model["forward_kl"]["value"]) in text
    for pair in values["differences"]:
        assert points(pair["old"]["value"]) in text
    for word in (
        "kl_weight 0.05",
        "TP 2 × PP 2",
        "lr 0.0005",
        "fine-tuning 61",
        "n = 200",
        "quick run",
        "recipe=tiny_cpu",
    ):
        assert word in text


def test_values_survive_json(values_and_pictures: tuple[dict[str, Any], dict[str, str]]):
    values, pictures = values_and_pictures
    again = json.loads(json.dumps(values, allow_nan=False))
    assert again["models"]["asft"]["new"]["value"] == pytest.approx(0.9)
    assert again["models"]["base"]["forgotten"] is None
    assert again["training"]["sft"]["first_kl"] == [None, None]
    assert again["training"]["asft"]["first_kl"] == [0.0, 0.0]
    assert again["training"]["asft"]["reference_seconds_a_step"] == 0.05
    assert page(again, pictures) == page(values, pictures)


def test_pictures_are_well_formed_and_name_every_line(
    values_and_pictures: tuple[dict[str, Any], dict[str, str]],
):
    _, pictures = values_and_pictures
    for name, picture in pictures.items():
        root = ElementTree.fromstring(picture)
        texts = {
            "".join(element.itertext()).strip() for element in root.iter() if element.tag.endswith("text")
        }
        assert {"SFT", "ASFT"} - texts == (set() if name != "kl" else {"SFT"})
        assert "width" not in root.attrib
        assert root.attrib["role"] == "img"


def test_the_kl_is_drawn_only_where_it_was_measured():
    lines = {"sft": [metrics(3, kl=False)], "asft": [metrics(3, kl=True)]}
    assert report.series(lines, "kl") == {"asft": [[0.0, 0.01, 0.02]]}
    assert set(report.series(lines, "nll")) == {"sft", "asft"}


def test_a_reference_that_is_not_the_base_is_said(
    values_and_pictures: tuple[dict[str, Any], dict[str, str]],
):
    values, pictures = values_and_pictures
    training = {**values["training"], "asft": {**values["training"]["asft"], "first_kl": [0.0, 0.003]}}
    assert "exactly 0" in page(values, pictures)
    shown = page({**values, "training": training}, pictures)
    assert "exactly 0" not in shown
    assert "at most 0.003 nats" in shown


@pytest.mark.parametrize(
    ("number", "text"), [(0.123, "+12.3"), (-0.05, "−5.0"), (0.0004, "0.0"), (-0.0004, "0.0")]
)
def test_points(number: float, text: str):
    assert points(number) == text


def test_labels_do_not_touch():
    placed = spread([0.5, 0.5, 0.52, 0.9], 0.1)
    assert sorted(placed) == pytest.approx(placed)
    assert min(b - a for a, b in pairwise(placed)) >= 0.1 - 1e-6
    assert placed[3] == 0.9
