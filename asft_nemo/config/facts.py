"""What a rule may look at."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from asft_nemo.config.model_shape import ModelShape
from asft_nemo.config.schema import RunConfig


class Level(enum.IntEnum):
    """Who gave a setting; later levels win."""

    SCHEMA = 0
    RECIPE = 1
    EXPERIMENT = 2
    COMMAND_LINE = 3


@dataclass(frozen=True)
class Facts:
    """What a rule may look at.

    Attributes:
        run: the settings.
        shape: the model's sizes, None where its config.json cannot be read.
        level_of: which level gave each dotted key.
        launched: `asft launch` asks: the stages run as `run.cluster` says.
    """

    run: RunConfig
    shape: ModelShape | None
    level_of: Mapping[str, Level]
    launched: bool = False

    def asked(self, key: str, *, least: Level = Level.EXPERIMENT) -> bool:
        """Whether an experiment or the command line gave this setting (or only the latter, with `least`)."""
        return self.level_of.get(key, Level.SCHEMA) >= least


Rule = Callable[[Facts], Iterator[str]]
