"""Rules about how a run is watched, rows of the tables of `asft_nemo.config.rules` and `asft_nemo.config.input_rules`."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator

from asft_nemo.config.facts import Facts, Level, Rule

_WANDB_NAME = re.compile(r"([^/\\#?%:\s]+/)?[^/\\#?%:]{1,128}")  # what W&B takes: [entity/]project


def _wandb_name(facts: Facts) -> Iterator[str]:
    name = facts.run.trainer.wandb
    if name is not None and not _WANDB_NAME.fullmatch(name):
        yield (
            f"trainer.wandb={name} is no name of a project: set PROJECT or ENTITY/PROJECT, without any of / \\ # ? % : in them"
        )


def _compared_ranks(facts: Facts) -> Iterator[str]:
    alarms = facts.run.alarms
    if alarms.straggler_factor is None and facts.asked("alarms.straggler_every", least=Level.COMMAND_LINE):
        yield "alarms.straggler_every does nothing with alarms.straggler_factor=null: leave it out"
    if alarms.nll_factor is None and facts.asked("alarms.nll_window", least=Level.COMMAND_LINE):
        yield "alarms.nll_window does nothing with alarms.nll_factor=null: leave it out"


def wandb_here(facts: Facts) -> Iterator[str]:
    """That what `trainer.wandb` asks for is installed where the ranks run."""
    if facts.run.trainer.wandb is not None and importlib.util.find_spec("wandb") is None:
        yield (
            f"trainer.wandb={facts.run.trainer.wandb} needs wandb, which is not installed: pip install wandb, or leave the setting out "
            "(TensorBoard events are written without it)"
        )


OBSERVING: tuple[Rule, ...] = (_wandb_name, _compared_ranks)
