"""Which calls of the kernel a program may not make: a seccomp filter. Runs inside the sandbox: imports the standard library alone.

Namespaces and limits leave gaps that no other guard closes: memory that belongs to no process (segments of System V, files in memory, shared
mappings, pages given to a pipe) is counted to nobody, keys of the evaluation's session stay readable, and sockets to the hypervisor know no network namespace. Calls that no
solution needs and that the kernel's own faults were found in are refused with them.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
import sys
from collections.abc import Sequence

from asft_eval.sandbox import kernel

#: call -> its number on x86_64, and on architectures with the generic table
REFUSED = {
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "open_by_handle_at": (304, 265),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_setup": (206, 0),
    "vmsplice": (278, 75), "splice": (275, 76), "tee": (276, 77),
}  # fmt: skip
_LOAD, _EQUAL, _HAS_BITS, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
#: call -> its numbers, and what its arguments, counted from 0, must all be for it to be refused
IN_PART = {
    "mmap": ((9, 222), [(3, _HAS_BITS, 0x01)]),  # MAP_SHARED and MAP_SHARED_VALIDATE; libraries are mapped privately
    "fcntl": ((72, 25), [(1, _EQUAL, 1031)]),  # F_SETPIPE_SZ
    "setsockopt": ((54, 208), [(1, _EQUAL, 1), (2, _EQUAL, 7)]),  # SO_SNDBUF
}  # fmt: skip
SOCKETS = {"socket": (41, 198), "socketpair": (53, 199)}
_FAMILIES = (1, 2, 10)  # unix, IPv4, IPv6: those that the network namespace closes
#: machine -> what the kernel calls it in a filter, and its column above
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1), "riscv64": (0xC00000F3, 1)}

_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # places in what the filter is given
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000  # from here on x86_64 has its calls once more


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]


def _step(code: int, value: int, if_not: int = 0, *, then: int = 0) -> bytes:
    """One instruction; `then` and `if_not` steps are skipped after a comparison."""
    return struct.pack("=HBBI", code, then, if_not, value)


def _refused_if(conditions: Sequence[tuple[int, int, int]]) -> list[bytes]:
    """Refuses a call where all conditions hold, and allows it elsewhere; of an argument the low word is looked at."""
    low = 0 if sys.byteorder == "little" else 4
    steps: list[bytes] = []
    for left, (argument, comparison, value) in zip(range(len(conditions), 0, -1), conditions, strict=True):
        load = _step(_LOAD, _FIRST_ARGUMENT + 8 * argument + low)
        steps += [load, _step(comparison, value, 2 * (left - 1) + 1)]
    return [*steps, _step(_RETURN, _FAIL | errno.EPERM), _step(_RETURN, _ALLOW)]


def _filter(machine: str) -> bytes:
    try:
        architecture, column = _MACHINES[machine]
    except KeyError:
        raise OSError(
            errno.ENOSYS, f"calls of the kernel cannot be filtered: their numbers on {machine} are not known"
        ) from None
    steps = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, architecture, then=1),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        _step(_AT_LEAST, _X32, 1),
        _step(_RETURN, _KILL),
    ]
    for numbers in REFUSED.values():
        steps += [_step(_EQUAL, numbers[column], 1), _step(_RETURN, _FAIL | errno.EPERM)]
    for numbers, conditions in IN_PART.values():
        refused = _refused_if(conditions)
        steps += [_step(_EQUAL, numbers[column], len(refused)), *refused]
    allowed = [part for family in _FAMILIES for part in (_step(_EQUAL, family, 1), _step(_RETURN, _ALLOW))]
    family = [_step(_LOAD, _FIRST_ARGUMENT), *allowed, _step(_RETURN, _FAIL | errno.EAFNOSUPPORT)]
    first, second = (numbers[column] for numbers in SOCKETS.values())
    steps += [_step(_EQUAL, first, then=1), _step(_EQUAL, second, len(family)), *family]
    return b"".join([*steps, _step(_RETURN, _ALLOW)])


def refuse_calls() -> None:
    """From now on, here and in every child, for good.

    Raises:
        OSError: this kernel or machine has no such filters.
    """
    steps = _filter(platform.machine())
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.set_filter(_Program(len(steps) // 8, steps))
