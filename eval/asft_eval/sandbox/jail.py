"""One run in the sandbox, seen from inside: namespaces, an empty root, limits, a supervisor, the program.

Runs in a process of its own and imports the standard library alone. Three processes make one run:

    guard       leaves the namespaces of the machine and waits
    supervisor  process 1 of its PID namespace: builds the root, watches time and memory, tells how the program ended;
                when it ends, the kernel ends everything in the namespace
    program     no capabilities, resource limits, calls of the kernel filtered, no way back
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asft_eval.sandbox import calls, kernel

SCRATCH = "/scratch"
# Any directory serves that holds nothing to be shown: the new root is mounted over it in a mount namespace of its own.
_PLACES = ("/tmp", "/mnt", "/srv", "/media")
_FIRST_USER = (
    200_000  # runs of root become users of their own, so that one run's processes are not counted to another
)
_NOBODY = 65_534
_WATCH_SECONDS = 0.05
_COUNTED = ("VmRSS:", "VmSwap:", "VmPTE:")
_DEVICES = ("null", "zero", "random", "urandom")

Order = Mapping[str, Any]


def run(order: Order, *, control: int, status: int, program: Callable[[], None]) -> None:
    """Contain this process, run `program` in it, report on `status`. Does not return.

    Args:
        order: `limits` (fields of `Limits`), `read_only` (paths to show), `contained` (True where another tool has made
            namespaces and root already), `keep` (file descriptors of the program).
        control: the run ends when its other end is closed.
        status: gets one JSON line with the outcome, or with `error` where the machine refuses a guard.
        program: called in the contained process.
    """
    try:
        if order["contained"]:
            _supervise(order, control, status, program)
        user = _spare_user()
        _leave_namespaces(user)
        child = os.fork()
        if child == 0:
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
            _build_root(order)
            _give_up_root(user)
            _supervise(order, control, status, program)
        for descriptor in order["keep"]:
            os.close(descriptor)
        os.waitpid(child, 0)
    except BaseException as error:
        os.write(
            status, json.dumps({"error": getattr(error, "strerror", None) or repr(error)}).encode() + b"\n"
        )
    os._exit(0)


def _spare_user() -> int | None:
    """Whom root becomes; None for other users, and for a root whose user namespace knows nobody else."""
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map") as file:
        ranges = [(int(first), int(first) + int(count)) for first, _, count in map(str.split, file)]
    for user in (_FIRST_USER + os.getpid(), _NOBODY):
        if any(first <= user < end for first, end in ranges):
            return user
    return None


def _leave_namespaces(user: int | None) -> None:
    """Root keeps its rights until the root directory stands; everybody else gets them from a user namespace.

    So does a root that may not make namespaces, as in a container, after it has become `user`.
    """
    flags = (
        kernel.CLONE_NEWNS
        | kernel.CLONE_NEWPID
        | kernel.CLONE_NEWNET
        | kernel.CLONE_NEWIPC
        | kernel.CLONE_NEWUTS
    )
    if user is not None:
        try:
            return kernel.unshare(flags)
        except PermissionError:
            _become(user)
    own_user, own_group = os.geteuid(), os.getegid()
    kernel.unshare(flags | kernel.CLONE_NEWUSER)
    _map_user(own_user, own_group)


def _become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root


def _map_user(user: int, group: int) -> None:
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot enter a user namespace: {os.strerror(error.errno or 0)}"
            ) from error


def _build_root(order: Order) -> None:
    """An empty read-only root with the system's programs, the interpreter, a few devices and the scratch directory."""
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    root = _place(order["read_only"])
    kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    for path in ("/usr", "/bin", "/lib", "/lib64", *order["read_only"]):
        _show(path, root)
    for name in ("proc", "dev", SCRATCH.lstrip("/")):
        os.mkdir(f"{root}/{name}")
    for name in _DEVICES:
        with open(f"{root}/dev/{name}", "w"):
            pass
        kernel.mount(f"/dev/{name}", f"{root}/dev/{name}", "", kernel.MS_BIND)
    closed = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("proc", f"{root}/proc", "proc", closed | kernel.MS_NOEXEC)
    size = order["limits"]["disk_bytes"]
    kernel.mount("tmpfs", root + SCRATCH, "tmpfs", closed, f"size={size},nr_inodes=4096,mode=777")
    if not os.path.lexists(f"{root}/tmp"):  # as it is where packages below /tmp are shown
        os.symlink(SCRATCH, f"{root}/tmp")
    kernel.become_root_of(root)
    kernel.mount("none", "/", "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | closed)


def _place(shown: Sequence[str]) -> str:
    """Where the new root is mounted: none of what is shown lies below it, as an environment under /tmp would."""
    for place in _PLACES:
        if os.path.isdir(place) and not any(f"{path}/".startswith(f"{place}/") for path in shown):
            return place
    raise OSError(errno.ENOENT, f"no directory for the new root, {' nor '.join(_PLACES)}")


def _show(path: str, root: str) -> None:
    """The same path, read-only, in the new root; a link stays a link."""
    target = root + path
    if not os.path.exists(path) or os.path.lexists(target):
        return
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    os.makedirs(target, exist_ok=True)
    kernel.bind_read_only(path, target)


def _give_up_root(user: int | None) -> None:
    """Root becomes a user without rights; then no further user namespace can be made below this one."""
    if user is not None and os.geteuid() == 0:
        _become(user)
        kernel.unshare(kernel.CLONE_NEWUSER)
        _map_user(user, user)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)  # forgotten at every change of user
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # nobody reads or traces the supervisor


def _supervise(order: Order, control: int, status: int, program: Callable[[], None]) -> None:
    deadline = time.monotonic() + order["limits"]["wall_seconds"]
    calls.refuse_calls()  # before the program is there: a machine without filters is told as such
    child = os.fork()
    if child == 0:
        _enter(order, program)
    for descriptor in order["keep"]:
        os.close(descriptor)
    outcome = _watch(child, control, deadline, order["limits"]["memory_bytes"])
    os.write(status, json.dumps(outcome).encode() + b"\n")
    os._exit(0)


def _watch(child: int, control: int, deadline: float, memory_bytes: int) -> dict[str, Any]:
    """Wait for the program; zombies of its children are reaped on the way."""
    ended = os.pidfd_open(child)
    while True:
        ready, _, _ = select.select([ended, control], [], [], _WATCH_SECONDS)
        if ended in ready:
            _, word = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(word)
            return {"kind": "exit", "number": code} if code >= 0 else {"kind": "signal", "number": -code}
        if control in ready:
            return {"kind": "closed", "number": 0}
        if time.monotonic() > deadline:
            return {"kind": "wall", "number": 0}
        if _used_bytes() > memory_bytes:
            return {"kind": "memory", "number": 0}


def _used_bytes() -> int:
    """Memory of all processes of the namespace but this one: resident, swapped out, and the tables of their pages."""
    kibibytes = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            try:
                with open(f"/proc/{name}/status") as file:
                    kibibytes += sum(int(line.split()[1]) for line in file if line.startswith(_COUNTED))
            except OSError:  # ended meanwhile
                continue
    return kibibytes * 1024


def _enter(order: Order, program: Callable[[], None]) -> None:
    """Limits on, rights off, then the program. Does not return."""
    try:
        os.setsid()
        os.chdir(SCRATCH)
        _close_all_but(set(order["keep"]))
        _limit(order["limits"])
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    except BaseException:
        os._exit(120)
    try:
        program()
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else int(error.code is not None))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _close_all_but(keep: set[int]) -> None:
    """Standard streams lead nowhere: nothing that a program prints is of use to anybody."""
    nowhere = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:  # the one that listed the directory
                continue
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115


def _limit(limits: Mapping[str, Any]) -> None:
    memory, seconds, disk = limits["memory_bytes"], limits["cpu_seconds"], limits["disk_bytes"]
    for what, soft, hard in (
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_FSIZE, disk, disk),
        (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
        (resource.RLIMIT_NPROC, limits["processes"], limits["processes"]),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(what, (soft, hard))
