"""One process that compares answers: JSON lines [gold, answer] in, [correct, why] out. Started by `math_pool`.

Time is measured as the processor's, so that a verdict does not depend on how busy the machine is.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from types import FrameType

from asft_eval.graders.math_judge import same


class _TooLong(BaseException):
    """Not an Exception: the libraries between catch those."""


def _stop(signum: int, frame: FrameType | None) -> None:
    raise _TooLong


def main(seconds: float, memory: int) -> None:
    """Answers until its input ends.

    Args:
        seconds: processor time for one comparison.
        memory: bytes of address space that this process may have.
    """
    _, most = resource.getrlimit(
        resource.RLIMIT_AS
    )  # a batch system may allow less, and nobody may raise that
    memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    same("x+1", "1+x")  # what is imported on first use must not count as the first comparison's time
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    signal.signal(signal.SIGVTALRM, _stop)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            correct, why = same(gold, answer)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        except _TooLong:
            correct, why = False, f"not decided within {seconds:g} s"
        except MemoryError:
            correct, why = False, "not decided within the memory allowed"
        except Exception as error:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            correct, why = False, f"not decided: {type(error).__name__}"
        sys.stdout.write(json.dumps([correct, why]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
