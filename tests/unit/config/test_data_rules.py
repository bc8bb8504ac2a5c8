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


LENGTHS = {"train": TWO, "group_by_length": True}

BAD: list[tuple[dict[str, Any], str]] = [
    ({"train": TWO, "templates": ["raw", "alpacca"]}, "names alpacca: choose from alpaca, chat, raw"),
    ({"train": TWO, "templates": ["raw"]}, "data.templates has 1 entry and data.train 2: name one"),
    ({"validation_templates": ["raw"]}, "data.validation_templates has 1 entry and data.validation 0"),
    ({"train": TWO, "weights": [1]}, "data.weights has 1 entry and data.train 2: give one weight for each"),
    ({"train": TWO, "weights": [1, 0]}, "gives 0 as the weight of b.jsonl: give a number above 0, or leave"),
    ({"train": TWO, "weights": [-1, 2]}, "gives -1 as the weight of a.jsonl"),
    ({"train": TWO, "weights": [1, float("nan")]}, "gives nan as the weight of b.jsonl"),
    ({"train": TWO, "weights": [float("inf"), 1]}, "gives inf as the weight of a.jsonl"),
    ({"train": TWO[:1], "weights": [1]}, "data.weights has nothing to blend"),
    ({**LENGTHS, "packing": True}, "does not go with data.packing=true, which leaves no padding to save"),
    ({**LENGTHS, "weights": [1, 2]}, "does not go with data.weights, which have an order of their own"),
]


@pytest.mark.parametrize(("data", "sentence"), BAD)
def test_one_mistake_gives_one_sentence(data: dict[str, Any], sentence: str) -> None:
    (found,) = said(data)
    assert sentence in found


GOOD: list[dict[str, Any]] = [
    {"train": TWO, "templates": ["raw", "chat"]},
    {"train": TWO, "templates": ["raw", "chat"], "template": "alpaca"},
    LENGTHS,
    {"train": TWO, "weights": [3, 0.5], "weights_by": "tokens", "when_exhausted": "stop"},
]


@pytest.mark.parametrize("data", GOOD)
def test_sensible_settings_pass(data: dict[str, Any]) -> None:
    assert said(data) == []


def test_settings_of_weights_do_nothing_alone() -> None:
    for key in ("weights_by", "when_exhausted"):
        (found,) = said({"train": TWO}, asked=(f"data.{key}",))
        assert found.startswith(f"data.{key} does nothing without data.weights: leave it out")
    stop = {"train": TWO, "weights": [1, 2], "when_exhausted": "stop"}
    (found,) = said(stop, asked=("data.when_exhausted",), trainer={"max_steps": 3})
    assert found.startswith("data.when_exhausted does nothing with trainer.max_steps")
    assert not said(stop, asked=("data.when_exhausted",), trainer={"epochs": 3})


def test_lengths_are_not_grouped_where_one_length_is_needed() -> None:
    others: list[tuple[str, dict[str, Any]]] = [
        ("parallel", {"cp_size": 2}),
        ("parallel", {"pp_size": 2, "vpp_size": 2}),
        ("reference", {"form": "resident", "micro_batch_size": 4}),
    ]
    for section, setting in others:
        sections: dict[str, Any] = {section: setting}
        (found,) = said(LENGTHS, **sections)
        assert found.startswith(f"data.group_by_length=true does not go with {section}.")
