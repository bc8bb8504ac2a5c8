"""Rules about the entries of data.train and data.validation: templates of their own, weights, and what goes with them."""

from __future__ import annotations

from typing import Any

import pytest

from asft_nemo.config.data_rules import DATA
from asft_nemo.config.facts import Facts, Level
from asft_nemo.config.schema import from_dict

TWO = ["a.jsonl", "b.jsonl"]


def said(data: dict[str, Any], *, asked: tuple[str, ...] = (), **sections: dict[str, Any]) -> list[str]:
    """What the rules about data say of settings, of which some were given on the command line."""
    run = from_dict(
        {
            "recipe": "test",
            "objective": {"name": "sft"},
            "reference": {"form": "none"},
            "peft": {"name": "none"},
            "cluster": {"name": "local"},
            "model": {"path": "somewhere"},
            "data": data,
            **sections,
        }
    )
    facts = Facts(run, None, dict.fromkeys(asked, Level.COMMAND_LINE))
    return [sentence for rule in DATA for sentence in rule(facts)]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"train": TWO, "templates": ["raw", "alpacca"]}, "names alpacca: choose from alpaca, chat, raw"),
    ({"train": TWO, "templates": ["raw"]}, "data.templates has 1 entries and data.train 2: name one"),
    ({"validation_templates": ["raw"]}, "data.validation_templates has 1 entries and data.validation 0"),
]


@pytest.mark.parametrize(("data", "sentence"), BAD)
def test_one_mistake_gives_one_sentence(data: dict[str, Any], sentence: str) -> None:
    (found,) = said(data)
    assert sentence in found


GOOD: list[dict[str, Any]] = [
    {"train": TWO, "templates": ["raw", "chat"]},
    {"train": TWO, "templates": ["raw", "chat"], "template": "alpaca"},
]


@pytest.mark.parametrize("data", GOOD)
def test_sensible_settings_pass(data: dict[str, Any]) -> None:
    assert said(data) == []
