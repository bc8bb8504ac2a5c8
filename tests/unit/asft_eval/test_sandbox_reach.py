"""What a program in the sandbox reaches for outside of it; each time the machine outside is looked at afterwards."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from asft_eval.graders.code import LIMITS, judge_program
from asft_eval.sandbox import Outcome, Sandbox, calls, open_sandbox
from contained import PROBLEM, QUICK, RIGHT, finds, gone, numbers, seen

pytestmark = pytest.mark.timeout(120)
PASSED = (True, "all tests passed (2 calls)")


@pytest.fixture
def mark() -> str:
    """A name that no other process has; the kernel keeps 15 characters."""
    return f"asft-{time.time_ns()}"[-15:]


def named(mark: str) -> str:
    """Code that gives its process and its children that name."""
    return f"import ctypes, os, time\nctypes.CDLL(None).prctl(15, {mark.encode()!r}, 0, 0, 0)\n"


# --- files ---------------------------------------------------------------------------------------------------


def test_links_lead_nowhere_outside(sandbox: Sandbox, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("kept")
    code = (
        f"real = {str(secret)!r}\n"
        "ways = [real, '../..' + real, '/proc/1/root' + real, '/proc/1/cwd' + real, '/proc/self/root' + real, '/proc/thread-self/cwd/..' + real]\n"
        "opened = []\n"
        "for number, way in enumerate(ways):\n"
        "    os.symlink(way, f'/scratch/{number}')\n"
        "    for mode in 'ra':\n"
        "        try:\n            open(f'/scratch/{number}', mode).close()\n            opened.append(way)\n"
        "        except OSError:\n            pass\n"
        "    try:\n        os.link(way, f'/scratch/hard{number}')\n        opened.append(way)\n"
        "    except OSError:\n        pass\n"
    )
    assert finds(sandbox, "opened == [] and len(os.listdir('/scratch')) == len(ways)", code)
    assert secret.read_text() == "kept"
    assert os.listdir(tmp_path) == ["secret"]


def test_keys_and_passwords_are_not_there(sandbox: Sandbox):
    assert Path("/etc/passwd").exists()
    paths = ["/etc/shadow", "/etc/passwd", "/root/.ssh", "/var/run", str(Path.home() / ".ssh"), str(Path.home() / ".cache")]  # fmt: skip
    paths += [f"/proc/{who}/root{path}" for who in (1, "self") for path in paths]
    assert finds(sandbox, f"not any(os.path.lexists(path) for path in {paths!r})")
    assert finds(sandbox, "os.path.expanduser('~') == '/scratch'")


def test_scratch_takes_no_more_than_its_size(sandbox: Sandbox):
    free = shutil.disk_usage("/tmp").free
    code = (
        "written = number = 0\n"
        "while number < 1000:\n"
        "    try:\n        with open(f'/scratch/{number}', 'wb', buffering=0) as file:\n"
        "            for _ in range(10):\n                written += file.write(bytes(1 << 20))\n"
        "    except OSError:\n        break\n"
        "    number += 1\n"
    )
    assert finds(sandbox, f"0 < written <= {LIMITS.disk_bytes}", code)
    assert not Path("/scratch").exists()
    assert (
        free - shutil.disk_usage("/tmp").free < 1 << 30
    )  # others write there, too, but nobody ten gigabytes


def test_thousands_of_open_files(sandbox: Sandbox):
    code = "files = []\ntry:\n    while len(files) < 5000:\n        files.append(os.open('/dev/null', 0))\nexcept OSError as error:\n    said = error.errno\n"
    assert finds(sandbox, f"50 < len(files) < {LIMITS.open_files} and said == 24", code)


def test_a_gigabyte_on_stdout_is_read_by_nobody(sandbox: Sandbox, capfd: pytest.CaptureFixture[str]):
    flood = (
        "import os, sys\nfor stream in (sys.stdout, sys.stderr):\n    for _ in range(500):\n        stream.write('x' * 1_000_000)\n"
        "os.write(1, b'x' * 1_000_000)\n"
    )
    assert judge_program(sandbox, PROBLEM, flood + RIGHT) == PASSED
    assert capfd.readouterr() == ("", "")


# --- memory that belongs to no process -----------------------------------------------------------------------

LIBC = (
    "import ctypes, fcntl, mmap, socket\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "def done(call, *arguments, **more):\n"
    "    try:\n        return bool(call(*arguments, **more) or True)\n"
    "    except OSError as error:\n        assert error.errno == 1\n"
)
OWNERLESS = {
    "segments of System V": "libc.shmget(0, 1 << 29, 0o1600) >= 0",
    "files in memory": "libc.memfd_create(b'x', 0) >= 0",
    "message queues": "libc.msgget(0, 0o1600) >= 0 or libc.mq_open(b'/x', 0o102, 0o600, None) >= 0",
    "semaphores": "libc.semget(0, 30000, 0o1600) >= 0",
    "shared mappings": "done(mmap.mmap, -1, 1 << 20) or done(mmap.mmap, -1, 1 << 20, flags=mmap.MAP_SHARED | 2)",
    "shared mappings of a device": "done(mmap.mmap, os.open('/dev/zero', os.O_RDWR), 1 << 20)",
    "shared and checked mappings": "done(mmap.mmap, os.open('/dev/zero', os.O_RDWR), 1 << 20, flags=3)",
    "pages given to a pipe": "libc.vmsplice(os.pipe()[1], None, 0, 0) >= 0 or libc.tee(os.pipe()[0], os.pipe()[1], 1, 0) >= 0",
    "larger pipes": "done(fcntl.fcntl, os.pipe()[1], 1031, 1 << 20)",
    "larger buffers of sockets": "done(socket.socketpair()[0].setsockopt, socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)",
    "rings of asynchronous files": "libc.syscall({'x86_64': 206}.get(os.uname().machine, 0), 1, ctypes.byref(ctypes.c_ulong())) >= 0",
}


@pytest.mark.parametrize("name", OWNERLESS)
def test_memory_that_belongs_to_no_process_cannot_be_had(sandbox: Sandbox, name: str):
    assert not finds(sandbox, OWNERLESS[name], LIBC)


def test_private_mappings_and_other_settings_stay_allowed(sandbox: Sandbox):
    ways = (
        "private = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\nprivate[:3] = b'abc'\n"
        "with open('/scratch/file', 'wb') as file:\n    file.write(b'xyz')\n"
        "copy = mmap.mmap(os.open('/scratch/file', os.O_RDONLY), 3, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)\n"
        "socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)\n"
        "flags = fcntl.fcntl(os.pipe()[0], fcntl.F_GETFD)\n"
    )
    assert finds(sandbox, "private[:3] == b'abc' and copy[:3] == b'xyz' and flags == 1", LIBC + ways)


def test_tables_of_pages_are_counted(sandbox: Sandbox):
    spread_out = (
        LIBC
        + (
            "libc.mmap.restype = ctypes.c_void_p\n"
            "libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]\n"
            "libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]\n"
            "for place in range(20_000):\n"  # a page every GiB takes two pages of tables, which stay when it is given back
            "    at = libc.mmap((place + 1024) << 30, 4096, 3, 0x22, -1, 0)\n"
            "    ctypes.memset(at, 1, 1)\n    libc.madvise(at, 4096, 4)\n"
            "import time\ntime.sleep(1)\n"
        )
    )
    small = replace(LIMITS, memory_bytes=150 << 20)
    assert sandbox.run(spread_out, limits=small) == Outcome("memory")
    assert sandbox.run(spread_out.replace("20_000", "200"), limits=small) == Outcome("exit", 0)


# --- other processes -----------------------------------------------------------------------------------------


def test_what_a_right_program_left_behind_ends_with_the_verdict(sandbox: Sandbox, mark: str):
    orphans = "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(100)\n    os._exit(0)\n"
    assert judge_program(sandbox, PROBLEM, named(mark) + orphans + RIGHT) == PASSED
    assert gone(mark)


def test_an_endless_loop_uses_no_processor_after_its_verdict(sandbox: Sandbox, mark: str):
    loop = named(mark) + "for _ in range(5):\n    os.fork()\nwhile True:\n    pass\n"
    assert not judge_program(sandbox, PROBLEM, loop, limits=QUICK)[0]
    assert gone(mark)


def test_a_sibling_cannot_be_traced_read_or_ended(sandbox: Sandbox, mark: str):
    with sandbox.start("script", {"code": named(mark) + "time.sleep(100)\n"}, limits=LIMITS) as sibling:
        assert seen(mark)
        (number,) = numbers(mark)
        code = LIBC + (
            f"got = [libc.ptrace(16, {number}, 0, 0), libc.ptrace(0x4206, {number}, 0, 0)]\n"
            f"got += [libc.process_vm_readv({number}, None, 0, None, 0, 0), libc.kill({number}, 9)]\n"
            "got += [libc.ptrace(16, os.getppid(), 0, 0)]\n"
        )
        assert finds(sandbox, f"got == [-1] * 5 and not os.path.exists('/proc/{number}')", code)
        assert numbers(mark) == [number]
        sibling.close()
        assert gone(mark)


def test_the_environment_of_no_process_can_be_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASFT_TEST_SECRET", "hidden-in-the-environment")
    code = (
        "texts = []\n"
        f"for who in [*os.listdir('/proc'), str(os.getppid()), '{os.getpid()}']:\n"
        "    for name in ('environ', 'cmdline', 'task/' + who + '/environ'):\n"
        "        try:\n            texts.append(open(f'/proc/{who}/{name}', 'rb').read())\n"
        "        except OSError:\n            pass\n"
    )
    with open_sandbox() as fresh:
        assert finds(fresh, "texts and not any(b'hidden-in' in text for text in texts)", code)
        assert not finds(fresh, "os.access(f'/proc/{os.getppid()}/environ', os.R_OK)")


def test_keys_of_the_session_are_out_of_reach(sandbox: Sandbox):
    number = {"x86_64": 250}.get(platform.machine(), 219)
    ask = LIBC + "libc.syscall.restype = ctypes.c_long\n"
    assert finds(sandbox, f"libc.syscall({number}, 0, -3, 0) == -1 and ctypes.get_errno() == 1", ask)


# --- sockets -------------------------------------------------------------------------------------------------


def test_sockets_by_name_reach_nobody(sandbox: Sandbox, tmp_path: Path):
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as on_disk:
        abstract.bind(f"\0asft-{time.time_ns()}")
        on_disk.bind(str(tmp_path / "socket"))
        for server in (abstract, on_disk):
            server.listen()
            server.settimeout(0.5)
            attempt = (
                "import socket\nwith socket.socket(socket.AF_UNIX) as client:\n"
                f"    reached = client.connect_ex({server.getsockname()!r}) == 0\n"
            )
            assert not finds(sandbox, "reached", attempt)
            with pytest.raises(TimeoutError):
                server.accept()


def test_sockets_that_know_no_network_namespace_cannot_be_had(sandbox: Sandbox):
    families = "import socket\nopened = []\nfor number in range(64):\n    try:\n        socket.socket(number, socket.SOCK_STREAM)\n        opened.append(number)\n    except OSError:\n        pass\n"
    assert finds(
        sandbox, "set(opened) <= {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6} and opened", families
    )


# --- the filter of calls -------------------------------------------------------------------------------------


def test_calls_in_the_other_numbers_of_a_processor_end_the_program(sandbox: Sandbox):
    if platform.machine() != "x86_64":
        pytest.skip("other machines have one table of calls")
    x32 = LIBC + "libc.syscall(0x40000000 + 39)\n"
    assert sandbox.run(x32, limits=LIMITS) == Outcome("signal", 31)


def test_a_machine_whose_numbers_are_unknown_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    with pytest.raises(OSError, match="their numbers on vax are not known"):
        calls.refuse_calls()


@pytest.mark.parametrize(
    ("headers", "column"),
    [(("x86_64-linux-gnu/asm/unistd_64.h", "asm/unistd_64.h"), 0), (("asm-generic/unistd.h",), 1)],
    ids=["x86_64", "generic"],
)
def test_the_numbers_are_those_of_the_kernels_headers(headers: tuple[str, ...], column: int):
    file = next((file for x in headers if (file := Path("/usr/include", x)).is_file()), None)
    if file is None:
        pytest.skip(f"none of {', '.join(headers)} here: they come with the C library's headers")
    rows = re.findall(r"^#define __NR(?:3264)?_(\w+) (\d+)$", file.read_text(), re.MULTILINE)
    known = dict(rows)
    partly = {name: place for name, (place, _) in calls.IN_PART.items()}
    ours = {**calls.REFUSED, **calls.SOCKETS, **partly}
    found = {name: int(known[name]) for name in ours if name in known}
    assert len(found) > 20
    assert found == {name: ours[name][column] for name in found}
