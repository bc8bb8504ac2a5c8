"""What a program in the sandbox cannot do: each attempt is made for real, and the machine outside is looked at afterwards."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from asft_eval import EvaluationError
from asft_eval.graders import grade
from asft_eval.graders.code import LIMITS, judge_program
from asft_eval.sandbox import Limits, Outcome, Sandbox, open_sandbox
from asft_eval.types import Example
from contained import PATIENT, PROBLEM, QUICK, RIGHT, WRONG, finds, gone, seen

pytestmark = pytest.mark.timeout(120)


def judged(sandbox: Sandbox, code: str, *, limits: Limits = PATIENT, go_on: bool = True) -> tuple[bool, str]:
    """The verdict; with `go_on` the next program must be judged as ever."""
    verdict = judge_program(sandbox, PROBLEM, code, limits=limits)
    if go_on:
        assert judge_program(sandbox, PROBLEM, RIGHT) == (True, "all tests passed (2 calls)")
    return verdict


def test_right_and_wrong(sandbox: Sandbox):
    assert judged(sandbox, RIGHT)[0]
    passed, reason = judged(sandbox, WRONG)
    assert not passed
    assert reason == "add(1, 2): returned -1, failed: assert add(1, 2) == 3"


ENDLESS = "passed its (limit of processor time|time limit)"  # whichever a busy machine reaches first
HOSTILE = {
    "endless loop": ("while True:\n    pass\n", ENDLESS),
    "endless loop in the call": ("def add(a, b):\n    while True:\n        pass\n", ENDLESS),
    "endless sleep": ("import time\ntime.sleep(1000)\n", "the program passed its time limit"),
    "10 GB of memory": ("x = bytearray(10_000_000_000)\n", "MemoryError"),
    "10 GB of memory bit by bit": (
        "x = []\nwhile True:\n    x.append(bytearray(50_000_000))\n",
        "MemoryError",
    ),
    "10 GB on disk": (
        "with open('/scratch/big', 'wb') as file:\n    for _ in range(10_000):\n        file.write(bytes(1 << 20))\n",
        "OSError: .*(File too large|No space)",
    ),
    "10 GB on disk in many files": (
        "for i in range(10_000):\n    with open(f'/scratch/{i}', 'wb') as file:\n        file.write(bytes(1 << 20))\n",
        "OSError: .*No space",
    ),
    "many small files": ("for i in range(1_000_000):\n    open(f'/scratch/{i}', 'w').close()\n", "No space"),
    "exit 0 before the tests": ("import os\nos._exit(0)\n", "it ended: the program exited with status 0"),
    "exit 0 in the call": (
        "import os\ndef add(a, b):\n    os._exit(0)\n",
        "add\\(1, 2\\): it ended: the program exited with status 0",
    ),
    "sys.exit before the tests": ("import sys\nsys.exit(0)\n", "does not load: SystemExit: 0"),
    "sys.exit in the call": ("import sys\ndef add(a, b):\n    sys.exit(0)\n", "SystemExit: 0"),
    "a verdict printed": (
        'import os\nprint(\'{"passed": true, "reason": "", "ended": false}\', flush=True)\n' + WRONG,
        "returned -1",
    ),
    "a verdict written everywhere": (
        "import os\nfor n in range(64):\n    try:\n"
        '        os.write(n, b\'{"passed": true, "reason": "", "ended": false}\\n\')\n'
        "    except OSError:\n        pass\n" + WRONG,
        "wrote something else|returned -1|it ended|KeyError|'value'",
    ),
    "streams closed": ("import os\nos.closerange(0, 64)\n" + RIGHT, "it ended"),
    "stdout flooded": (
        "import sys\nwhile True:\n    sys.stdout.write('x' * 1_000_000)\n",
        ENDLESS,
    ),
    "an answer without end": ("def add(a, b):\n    return 'x' * 17_000_000\n", "answered more than 16 MiB"),
    "assert and == patched": (
        "import builtins, unittest, operator\n"
        "class AssertionError(Exception): pass\n"
        "builtins.AssertionError = AssertionError\noperator.eq = lambda a, b: True\n"
        "unittest.TestCase.assertEqual = lambda *a: None\n"
        "builtins.compile = builtins.exec = lambda *a, **k: None\n" + WRONG,
        "returned -1",
    ),
    "equal to everything": (
        "class Yes(int):\n    def __eq__(self, other): return True\n"
        "    def __hash__(self): return 0\n"
        "def add(a, b):\n    return Yes(7)\n",
        "returned 7, failed",
    ),
    "equal to everything, no number": (
        "class Yes:\n    def __eq__(self, other): return True\ndef add(a, b):\n    return Yes()\n",
        "a value of type Yes, which is not plain data",
    ),
    "the frames of the caller": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n"
        "    for name in list(frame.f_globals):\n        frame.f_globals.pop(name) if name == 'judge' else None\n"
        "    frame = frame.f_back\n" + WRONG,
        "returned -1",
    ),
    "crash": ("import ctypes\nctypes.string_at(0)\n", "segmentation fault"),
    "endless recursion": ("def add(a, b):\n    return add(a, b)\n", "RecursionError"),
    "killing itself": ("import os\nos.kill(os.getpid(), 9)\n", "it ended: the program was killed"),
    "no program": ("this is no Python", "does not load: SyntaxError"),
    "no function": ("x = 1\n", "the program defines no add"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_fail_with_a_reason(sandbox: Sandbox, name: str):
    code, reason = HOSTILE[name]
    limits = QUICK if "time" in reason else PATIENT
    passed, said = judged(sandbox, code, limits=limits, go_on=False)  # the next one shows it
    assert not passed
    assert re.search(reason, said), said


def test_a_fork_bomb_ends(sandbox: Sandbox):
    before = len(os.listdir("/proc"))
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    passed, reason = judged(sandbox, bomb, limits=QUICK)
    assert not passed
    assert "time" in reason
    assert len(os.listdir("/proc")) < before + 100
    counted = "n = 0\ntry:\n    while n < 1000:\n        if os.fork() == 0:\n            import time; time.sleep(60)\n        n += 1\nexcept BlockingIOError:\n    pass\n"
    assert finds(sandbox, f"0 < n < {QUICK.processes}", counted)


def test_files_outside_are_not_there(sandbox: Sandbox, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    assert not finds(sandbox, f"os.path.exists({str(secret)!r})")
    assert not finds(sandbox, f"os.path.exists({str(Path(__file__))!r})")
    assert not finds(
        sandbox, "os.path.exists('/etc/passwd') or os.path.exists('/home') or os.path.exists('/var')"
    )
    deletion = (
        "import shutil\nfor path in ('/usr/bin', '/dev', '/scratch', '/root', '/proc'):\n    shutil.rmtree(path, ignore_errors=True)\n"
        f"try:\n    os.unlink({str(secret)!r})\nexcept OSError:\n    pass\n"
    )
    assert finds(sandbox, "os.listdir('/usr/bin') and os.path.exists('/dev/null')", deletion)
    assert secret.read_text() == "x"


def test_packages_of_an_environment_below_tmp_are_shown(tmp_path: Path):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "one.py").write_text("")
    (tmp_path / "own.txt").touch()
    with open_sandbox([tmp_path / "packages"]) as own:
        assert finds(own, f"os.path.exists({str(tmp_path / 'packages' / 'one.py')!r})")
        assert finds(own, f"os.listdir({str(tmp_path)!r}) == ['packages']")
        assert finds(own, "__import__('tempfile').mkstemp() != ''")


def test_nothing_but_the_scratch_directory_is_writable(sandbox: Sandbox):
    walk = (
        "found = set()\n"
        "for top, folders, _ in os.walk('/'):\n"
        "    folders[:] = [f for f in folders if os.path.join(top, f) not in ('/proc', '/usr/share', '/usr/lib', '/usr/include')]\n"
        "    try:\n        open(os.path.join(top, 'x'), 'w').close()\n        found.add(top)\n"
        "    except OSError:\n        pass\n"
    )
    assert finds(sandbox, "found == {'/scratch'}", walk)
    assert finds(sandbox, "not os.listdir('/scratch')")


def test_no_network(sandbox: Sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        address = server.getsockname()
        attempt = (
            f"import socket\nreached = True\ntry:\n    socket.create_connection({address!r}, 2).close()\n"
            "except OSError:\n    reached = False\n"
        )
        assert not finds(sandbox, "reached", attempt)
        with pytest.raises(TimeoutError):
            server.accept()
    devices = "names = [line.split(':')[0].strip() for line in open('/proc/net/dev') if ':' in line]\n"
    assert finds(sandbox, "names in ([], ['lo'])", devices)


def test_the_environment_and_arguments_are_clean(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASFT_TEST_SECRET", "hidden")
    with open_sandbox() as fresh:
        assert not finds(fresh, "any('SECRET' in name for name in os.environ)")
        assert finds(fresh, "not os.access('/proc/self/environ', os.R_OK)")


def test_processes_outside_are_out_of_reach(sandbox: Sandbox):
    assert finds(sandbox, "len([name for name in os.listdir('/proc') if name.isdigit()]) <= 2")
    kill = (
        "import signal\nfor number in (1, os.getppid(), -1):\n    try:\n        os.kill(number, signal.SIGKILL) if number != -1 else None\n"
        "    except OSError:\n        pass\n"
    )
    outcome = sandbox.run(kill + "import sys\nsys.exit(5)\n", limits=PATIENT)
    assert outcome.kind in ("exit", "signal", "lost")
    assert judge_program(sandbox, PROBLEM, RIGHT)[0]
    passed, _ = judged(sandbox, "import os\nos.kill(-1, 9)\n" + WRONG)
    assert not passed


def test_no_rights_and_no_way_to_get_some(sandbox: Sandbox):
    assert finds(sandbox, "os.getuid() != 0 and os.geteuid() != 0")
    status = "text = open('/proc/self/status').read().split()\n"
    assert finds(
        sandbox,
        "int(text[text.index('CapEff:') + 1], 16) == int(text[text.index('CapBnd:') + 1], 16) == 0",
        status,
    )
    assert finds(sandbox, "text[text.index('NoNewPrivs:') + 1] == '1'", status)
    unshare = (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "got = [libc.unshare(flag) for flag in (0x10000000, 0x20000, 0x40000000)]\n"
        "got += [libc.mount(b'none', b'/scratch', b'tmpfs', 0, None), libc.ptrace(16, 1, 0, 0)]\n"
    )
    assert finds(sandbox, "got == [-1] * 5", unshare)
    assert not finds(sandbox, "os.access('/proc/1/mem', os.R_OK) or os.access('/proc/1/environ', os.R_OK)")


def test_memory_of_many_processes_is_counted_together(sandbox: Sandbox):
    small = replace(PATIENT, memory_bytes=256 << 20)
    code = "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        break\nx = bytearray(b'1') * (100 << 20)\ntime.sleep(60)\n"
    assert sandbox.run(code, limits=small) == Outcome("memory")


def test_processes_end_with_the_run_and_runs_with_the_sandbox():
    with open_sandbox() as own:
        mark = f"asft-{time.time_ns()}"
        leave = (
            f"import ctypes, os, time\nctypes.CDLL(None).prctl(15, {mark[-15:].encode()!r}, 0, 0, 0)\n"
            "if os.fork() == 0:\n    time.sleep(100)\n"
        )
        assert own.run(leave, limits=PATIENT) == Outcome("exit", 0)
        assert gone(mark[-15:])
        run = own.start("script", {"code": leave + "time.sleep(100)\n"}, limits=LIMITS)
        assert seen(mark[-15:])
    assert gone(mark[-15:])
    run.close()


def test_code_runs_only_where_it_is_allowed():
    pair = (Example("1", "", PROBLEM.to_answer()), RIGHT)
    with pytest.raises(EvaluationError, match="add --allow-code-execution"):
        grade("code", [pair])
    (score,) = grade("code", [pair], allow_code_execution=True)
    assert score.correct
    assert score.parsed == RIGHT + "\n"


REFUSING = """
import sys
sys.path.insert(0, sys.argv[1])
from asft_eval.errors import EvaluationError
from asft_eval.sandbox import Limits, open_sandbox
try:
    with open_sandbox() as box:
        print(box.run("import sys; sys.exit(9)", limits=Limits()).number)
except EvaluationError as error:
    print(error)
"""


def in_user_namespace(script: str) -> str:
    """What REFUSING prints as the root of a user namespace in which `script` has run before."""
    unshare = ["unshare", "--user", "--map-root-user", "sh", "-c", f'{script}; exec "$@"', "sh"]
    source = Path(open_sandbox.__code__.co_filename).parents[2]
    run = [*unshare, sys.executable, "-c", REFUSING, str(source)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=110, check=False)
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(done.stderr)
    return done.stdout.strip() or done.stderr


def test_without_root_it_works_alike(sandbox: Sandbox):
    assert in_user_namespace("true") == "9"


def test_a_machine_that_refuses_a_guard_is_refused(sandbox: Sandbox):
    said = in_user_namespace("echo 0 > /proc/sys/user/max_user_namespaces")
    assert said.startswith("this machine cannot contain a program: cannot create namespaces")
    assert "user.max_user_namespaces" in said


def test_a_machine_without_linux_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(EvaluationError, match="Linux"):
        open_sandbox()
