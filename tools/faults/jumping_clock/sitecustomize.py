"""Found by every Python that is started with this folder in PYTHONPATH: the clock of the wall jumps by hours, back and forth, at every look.

`time.monotonic` and `time.perf_counter` stay as they are: no system lets them jump. `datetime` reads the clock by itself and stays, too.
"""

import random
import time

_chance = random.Random(0)
_time, _time_ns = time.time, time.time_ns


def _jump() -> float:
    return _chance.choice((-1, 1)) * _chance.uniform(0.0, 6 * 3600.0)


time.time = lambda: _time() + _jump()
time.time_ns = lambda: _time_ns() + int(_jump() * 1e9)
