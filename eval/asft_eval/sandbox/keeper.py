"""Starts runs: a process with a clean environment and nothing of the evaluation in its memory, forked once a run.

Imports the standard library alone. The evaluation sends a byte and file descriptors over a socket: control, status, and
those that the program keeps; the order itself comes over control.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import struct
from typing import Any

from asft_eval.sandbox import jail, kernel
from asft_eval.sandbox.programs import PROGRAMS

_MOST_DESCRIPTORS = 8


def serve(connection: int) -> None:
    """Fork a run for every request until the other end closes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()  # else the first collection of every run copies the pages that it shares with this process
    requests = socket.socket(fileno=connection)
    while True:
        word, descriptors, _, _ = socket.recv_fds(requests, 1, _MOST_DESCRIPTORS)
        if not word:
            os._exit(0)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
            requests.close()
            run_one(descriptors[0], descriptors[1], descriptors[2:])
        for descriptor in descriptors:
            os.close(descriptor)


def run_one(control: int, status: int, keep: list[int]) -> None:
    """Read the order from `control` and carry it out. Does not return."""
    (length,) = struct.unpack("!I", _read(control, 4))
    order: dict[str, Any] = json.loads(_read(control, length))
    order["keep"] = keep
    program = PROGRAMS[order["program"]]
    jail.run(order, control=control, status=status, program=lambda: program(order["payload"], keep))


def _read(descriptor: int, count: int) -> bytes:
    parts = b""
    while len(parts) < count:
        part = os.read(descriptor, count - len(parts))
        if not part:
            os._exit(0)
        parts += part
    return parts
