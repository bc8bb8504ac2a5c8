"""Many answers compared at once, in processes that can be stopped: algebra on what a model wrote may never end.

What needs no algebra is decided here; equal (gold, answer) pairs are compared once. The processes are ordinary children over
pipes, so this works in any thread and in worker processes of others, where `multiprocessing` and alarms do not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from asft_eval.errors import EvaluationError
from asft_eval.graders.math_judge import LONGEST, Verdict, quick
from asft_eval.graders.math_text import find_answer
from asft_eval.types import Score

SECONDS = 5.0
"""Processor time for one comparison."""
_MEMORY = 4 << 30
_PATIENCE = 3.0  # wall time over processor time before the process is killed; a busy machine is slower
_PAIRS_PER_PROCESS = 30  # a process takes about a second to start


def grade_math(
    pairs: Sequence[tuple[str, str]], *, processes: int | None = None, seconds: float = SECONDS
) -> list[Score]:
    """The verdicts on (gold, completion) pairs, in their order.

    Args:
        pairs: the right answer and what the model wrote.
        processes: that compare at the same time; None = as many as there are cores, and fewer for few pairs.
        seconds: processor time for one comparison; what takes longer counts as wrong and says so.

    Raises:
        EvaluationError: math-verify is not installed, or the processes do not start.
    """
    found = [find_answer(completion) for _, completion in pairs]
    wanted = {(gold, one.text) for (gold, _), one in zip(pairs, found, strict=True) if one.text}
    verdicts: dict[tuple[str, str], Verdict] = {}
    hard: list[tuple[str, str]] = []
    for pair in sorted(wanted):
        verdict = quick(*pair)
        if verdict is None:
            hard.append(pair)
        else:
            verdicts[pair] = verdict
    if hard:
        verdicts.update(_compare(hard, processes, seconds))
    scores: list[Score] = []
    for (gold, _), one in zip(pairs, found, strict=True):
        correct, why = verdicts[gold, one.text] if one.text else (False, "")
        scores.append(Score(correct, one.text[:LONGEST], f"{one.where}: {why}" if why else one.where))
    return scores


def _compare(
    hard: Sequence[tuple[str, str]], processes: int | None, seconds: float
) -> dict[tuple[str, str], Verdict]:
    if importlib.util.find_spec("math_verify") is None:
        raise EvaluationError(
            "math-verify is not installed and the grader of mathematics needs it: pip install 'math-verify[antlr4_9_3]'"
        )
    todo: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    for pair in hard:
        todo.put(pair)
    verdicts: dict[tuple[str, str], Verdict] = {}
    count = processes or min(len(os.sched_getaffinity(0)), -(-len(hard) // _PAIRS_PER_PROCESS))
    threads = [threading.Thread(target=_serve, args=(todo, verdicts, seconds)) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:  # where this is interrupted they begin nothing more: Python waits for them at its end
        with contextlib.suppress(queue.Empty):
            while True:
                todo.get_nowait()
    if len(verdicts) < len(hard):
        raise EvaluationError(
            f"the processes that grade mathematics do not start: see what `{sys.executable} -m asft_eval.graders.math_worker 5 {_MEMORY}` says, "
            "and allow more memory where that is it (ulimit -v)"
        )
    return verdicts


def _serve(
    todo: queue.SimpleQueue[tuple[str, str]], verdicts: dict[tuple[str, str], Verdict], seconds: float
) -> None:
    """One thread and its process, until nothing is left."""
    process = _Process(seconds)
    try:
        while True:
            try:
                pair = todo.get_nowait()
            except queue.Empty:
                return
            verdicts[pair] = process.ask(pair)
    except _NotStartedError:
        return  # `_compare` says it: what was not compared is not wrong
    finally:
        process.close()


class _NotStartedError(Exception):
    """A process ended before it could compare anything."""


class _Process:
    """A `math_worker`, started when it is first needed and again after it had to be killed."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, pair: tuple[str, str]) -> Verdict:
        """The verdict on one (gold, answer) pair; wrong, with the reason, where there is none in time.

        Raises:
            _NotStartedError: the process does not start.
        """
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(pair).encode() + b"\n")
            child.stdin.flush()
            line = b""
            if select.select([child.stdout], [], [], self._seconds * _PATIENCE)[0]:
                line = child.stdout.readline()
                if line:
                    correct, why = json.loads(line)
                    return bool(correct), str(why)
                return False, f"not decided: the process ended ({self.close()})"
            self.close()
            return False, f"not decided within {self._seconds:g} s"
        except BrokenPipeError:
            return False, f"not decided: the process ended ({self.close()})"

    def _start(self) -> subprocess.Popen[bytes]:
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._child = subprocess.Popen(
            [sys.executable, "-m", "asft_eval.graders.math_worker", str(self._seconds), str(_MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._child.stdout is not None
        if not self._child.stdout.readline():  # "ready", or nothing where it ended
            raise _NotStartedError
        return self._child

    def close(self) -> int:
        """End the process; its exit status."""
        child, self._child = self._child, None
        if child is None:
            return 0
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        return child.wait()
