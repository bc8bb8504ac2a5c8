"""The sandbox from outside: starts runs, reads how they ended, ends them with their owner."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from asft_eval.errors import EvaluationError
from asft_eval.sandbox.limits import Limits, Outcome

_GRACE_SECONDS = (
    10.0  # after the wall time: the supervisor ends a run by itself, this is for a machine that swaps
)
_INSIDE = ("kernel", "calls", "jail", "wire", "programs", "keeper")
_CURE = (
    "allow user namespaces (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0; a container: "
    "--cap-add SYS_ADMIN with seccomp and AppArmor profiles that let it), or grade on another machine"
)
_PACKAGE = "asft_eval.sandbox"
_START = """
import json, os, sys, types
parts = []
while part := os.read(0, 1 << 16):
    parts.append(part)
order = json.loads(b"".join(parts))
for name in ("asft_eval", "asft_eval.sandbox"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
sys.path[:] = [path for path in sys.path if path]
for name, source in order["modules"].items():
    module = sys.modules[name] = types.ModuleType(name)
    setattr(sys.modules["asft_eval.sandbox"], name.rpartition(".")[2], module)
    exec(compile(source, name, "exec"), module.__dict__)
for name in order["preload"]:
    __import__(name)
sys.modules["asft_eval.sandbox.keeper"].serve(order["connection"])
"""
#: what solutions and tests import most: loaded once, inherited by every run
_PRELOAD = (
    "typing",
    "math",
    "re",
    "collections",
    "itertools",
    "functools",
    "string",
    "random",
    "copy",
    "heapq",
)
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/scratch",
    "LANG": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # one program, one verdict
    "PYTHONDONTWRITEBYTECODE": "1",
}


class Run:
    """One run that has begun. Close it, or use it as a context manager: its processes end with it."""

    def __init__(self, control: int, status: int, limits: Limits):
        self._control, self._status = control, status
        self._seconds = limits.wall_seconds + _GRACE_SECONDS
        self._open = True

    def wait(self, seconds: float | None = None) -> Outcome:
        """How the run ended; "lost" where it does not within `seconds` (None: its time limit and a grace).

        Raises:
            EvaluationError: the machine refused one of the guards; nothing has run.
        """
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._status], [], [], self._seconds if seconds is None else seconds)
            part = os.read(self._status, 1 << 16) if ready else b""
            if not part:
                return Outcome("lost")
            line += part
        word: dict[str, Any] = json.loads(line)
        if "error" in word:
            raise EvaluationError(f"this machine cannot contain a program: {word['error']}: {_CURE}")
        return Outcome(word["kind"], word["number"])

    def close(self) -> None:
        """End whatever of the run is left."""
        if self._open:
            self._open = False
            os.close(self._control)
            os.close(self._status)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Sandbox:
    """Starts contained runs. Threads may share one.

    Args:
        python: the interpreter that runs the programs.
        read_only: directories that runs see besides the system's and the interpreter's.
    """

    def __init__(self, python: Path, read_only: Sequence[Path] = ()):
        self._read_only = [str(path) for path in (_prefix(python), *read_only)]
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        self._requests = ours
        order = {
            "modules": {f"{_PACKAGE}.{name}": _source(name) for name in _INSIDE},
            "preload": _PRELOAD,
            "connection": theirs.fileno(),
        }
        with theirs:
            self._keeper = subprocess.Popen(
                [str(python), "-s", "-S", "-c", _START],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=_ENVIRONMENT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        assert self._keeper.stdin is not None
        with suppress(BrokenPipeError), self._keeper.stdin as pipe:
            pipe.write(json.dumps(order).encode())

    def start(
        self,
        program: str,
        payload: Mapping[str, Any],
        *,
        limits: Limits,
        descriptors: Sequence[int] = (),
    ) -> Run:
        """Begin a run of one of `programs.PROGRAMS`.

        Args:
            program: its name.
            payload: its settings, as JSON.
            limits: of this run.
            descriptors: given to the program; the caller may close its own afterwards.

        Raises:
            EvaluationError: the process that starts runs is gone.
        """
        order = {
            "contained": False,
            "limits": asdict(limits),
            "read_only": self._read_only,
            "program": program,
            "payload": payload,
        }
        control, their_control = socket.socketpair()
        status, their_status = os.pipe()
        try:
            with self._lock:
                socket.send_fds(self._requests, [b"r"], [their_control.fileno(), their_status, *descriptors])
            message = json.dumps(order).encode()
            control.sendall(struct.pack("!I", len(message)) + message)
        except OSError as error:
            control.close()
            os.close(status)
            raise EvaluationError(
                f"the sandbox ended unexpectedly ({error}): run the evaluation again"
            ) from error
        finally:
            their_control.close()
            os.close(their_status)
        return Run(control.detach(), status, limits)

    def run(self, code: str, *, limits: Limits) -> Outcome:
        """Run a script to its end."""
        with self.start("script", {"code": code}, limits=limits) as run:
            return run.wait()

    def close(self) -> None:
        """End every run and the process that starts them."""
        self._requests.close()
        self._keeper.kill()
        self._keeper.wait()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_sandbox(read_only: Sequence[Path] = ()) -> Sandbox:
    """A sandbox in which every guard has been seen to work.

    Args:
        read_only: directories that runs see besides the system's and the interpreter's.

    Raises:
        EvaluationError: this machine lacks one; the message names it.
    """
    if sys.platform != "linux":
        raise EvaluationError("programs of a model are run on Linux alone: grade the results there")
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    sandbox = Sandbox(Path(sys.base_prefix, "bin", name), read_only)
    try:
        outcome = sandbox.run("", limits=Limits())
        if outcome != Outcome("exit", 0):
            raise EvaluationError(f"the sandbox does not start here ({outcome.reason}): {_CURE}")
    except EvaluationError:
        sandbox.close()
        raise
    return sandbox


def _prefix(python: Path) -> Path:
    return python.resolve().parent.parent


def _source(name: str) -> str:
    return Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
