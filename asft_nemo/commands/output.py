"""What all commands share: exit codes, how a result is printed, progress."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from asft_nemo.errors import UserError

DONE, BUG, MENDABLE, INTERRUPTED = 0, 1, 2, 130

Progress = Callable[[int, int, str], None]
Command: TypeAlias = Callable[[argparse.Namespace], int]
#: makes a command's parser: name, what it runs, one line of help
Add: TypeAlias = Callable[[str, Command, str], argparse.ArgumentParser]


class Parser(argparse.ArgumentParser):
    """argparse whose usage errors are our user errors: one sentence, exit code 2."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}: see {self.prog} --help")


def answer(arguments: argparse.Namespace, values: dict[str, Any], words: str) -> None:
    """The result on stdout: one JSON object with --json, else words."""
    print(json.dumps(values) if arguments.json else words)


@contextmanager
def progress_of(what: str) -> Iterator[Progress]:
    """A callback (done, all, name), in bytes: a bar on a terminal, else a line every ten seconds."""
    if not sys.stderr.isatty():
        yield lines_of(what)
        return
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024) as bar:

        def show(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_postfix_str(name, refresh=False)
            bar.update(done - bar.n)

        yield show


def lines_of(what: str, *, seconds: float = 10.0) -> Progress:
    """A callback that prints a line every `seconds` at most."""
    started = last = time.monotonic()

    def show(done: int, total: int, name: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds and done:
            last = now
            left = (now - started) * (total - done) / done
            print(f"{what}: {100 * done / total:.0f} % ({name}), about {left:.0f} s left", file=sys.stderr)

    return show
