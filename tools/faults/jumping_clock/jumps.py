"""The clock of the wall, as Python reads it, jumps by hours, back and forth, at every look.

`time.monotonic` and `time.perf_counter` stay as they are: no system lets them jump. So do the times that the file system gives.
"""

from __future__ import annotations

import datetime
import random
import sys
import time
from typing import Any

_HOURS = 6.0
_time, _time_ns, _datetime = time.time, time.time_ns, datetime.datetime
_chance = random.Random(0)


def _jump() -> float:
    return _chance.choice((-1, 1)) * _chance.uniform(0.0, _HOURS * 3600.0)


class _IsTime(type):
    """What the system's own functions make is an instance, too."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _datetime)


class _Jumping(_datetime, metaclass=_IsTime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return _datetime.now(tz) + datetime.timedelta(seconds=_jump())

    @classmethod
    def utcnow(cls) -> Any:
        return _datetime.utcnow() + datetime.timedelta(seconds=_jump())

    @classmethod
    def today(cls) -> Any:
        return cls.now()


_Jumping.__module__, _Jumping.__name__, _Jumping.__qualname__ = "datetime", "datetime", "datetime"


def jump(*, calendar: bool = True) -> None:
    """Lets it jump from here on, in this process; also for modules that have taken the functions by name.

    Args:
        calendar: `datetime`, too. Not before pandas is imported, whose compiled modules look for the class that Python brings.
    """
    instead: dict[int, Any] = {
        id(_time): lambda: _time() + _jump(),
        id(_time_ns): lambda: _time_ns() + int(_jump() * 1e9),
    }
    if calendar:
        instead[id(_datetime)] = _Jumping
    for module in list(sys.modules.values()):
        if module is None or module.__name__ == __name__:
            continue
        for name, value in list(vars(module).items()):
            if id(value) in instead:
                setattr(module, name, instead[id(value)])
