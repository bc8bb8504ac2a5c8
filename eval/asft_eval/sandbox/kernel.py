"""The few calls of the Linux kernel that Python lacks. Runs inside the sandbox: imports the standard library alone."""

from __future__ import annotations

import ctypes
import os
import platform

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_MOUNT_SETATTR = 442  # the same number on every architecture
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = [
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns", ctypes.c_uint64),
    ]


def _checked(status: int, what: str) -> int:
    if status < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return status


def unshare(flags: int) -> None:
    """Leave the namespaces that the flags name for new ones."""
    _checked(_libc.unshare(flags), "cannot create namespaces")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    words = (os.fsencode(source), os.fsencode(target), kind.encode())
    status = _libc.mount(*words, ctypes.c_ulong(flags), options.encode())
    _checked(status, f"cannot mount {kind or source} on {target}")


def bind_read_only(source: str, target: str) -> None:
    """Show `source` and all mounted below it at `target`, read-only, without devices and set-user-id programs."""
    mount(source, target, "", MS_BIND | MS_REC)
    wanted = _MountAttributes(set=_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV)
    status = _libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(-100),
        os.fsencode(target),
        ctypes.c_uint(_AT_RECURSIVE),
        ctypes.byref(wanted),
        ctypes.c_size_t(ctypes.sizeof(wanted)),
    )
    _checked(status, f"cannot make {target} read-only")


def become_root_of(folder: str) -> None:
    """Make `folder` the root of the file system; the former one is out of reach afterwards."""
    os.chdir(folder)
    number = _PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise OSError(f"pivot_root has no known number on {platform.machine()}")
    _checked(_libc.syscall(ctypes.c_long(number), b".", b"."), "cannot change the root")
    _checked(_libc.umount2(b".", MNT_DETACH), "cannot leave the former root")
    os.chdir("/")


def prctl(option: int, argument: int) -> None:
    """prctl(2) with one argument."""
    status = _libc.prctl(ctypes.c_int(option), ctypes.c_ulong(argument), 0, 0, 0)
    _checked(status, f"prctl {option} failed")


def set_filter(program: ctypes.Structure) -> None:
    """Give every call of this process and its children to a seccomp filter."""
    status = _libc.prctl(
        ctypes.c_int(_PR_SET_SECCOMP), ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(program), 0, 0
    )
    _checked(status, "cannot filter calls of the kernel")


def drop_capabilities() -> None:
    """Give up every capability, now and after any exec, for good."""
    for number in range(64):
        try:
            prctl(PR_CAPBSET_DROP, number)
        except OSError:  # past the last capability that this kernel knows
            break
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _checked(_libc.capset(ctypes.byref(header), ctypes.byref(nothing)), "cannot drop capabilities")
