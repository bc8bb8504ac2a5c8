"""The signal to stop is heard between steps, and by the process it was meant for alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Says when it listens, then what it heard; a program and a helper process, such as write a checkpoint, are signalled with it, as Slurm
# signals all processes of a step. A helper's start must leave the signals blocked.
LISTENER = """
import multiprocessing, signal, subprocess, sys, time
from asft_nemo import stop_signal
assert not stop_signal.listening()
stop_signal.listen()
words = "import sys; sys.stdin.read(); print('child lives', flush=True)"
child = subprocess.Popen([sys.executable, "-c", words], stdin=subprocess.PIPE)
helper = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(1,))
helper.start()
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= set(stop_signal.SIGNALS)
print("listening", flush=True)
assert stop_signal.heard(within=20)
helper.join()
assert helper.exitcode == 0, helper.exitcode
assert stop_signal.listening()
child.communicate()
print("heard", child.returncode, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_group_is_heard_and_ends_nobody(number: signal.Signals) -> None:
    process = subprocess.Popen(
        # as a stage's script starts a rank
        ["bash", "-c", f"trap '' USR1; exec {sys.executable} -c '{LISTENER}'".replace("'child lives'", '\\"child lives\\"')],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    time.sleep(0.3)  # the child has started
    os.killpg(process.pid, number)
    assert process.communicate(timeout=240)[0] == "child lives\nheard 0\n"
    assert process.returncode == 0


def test_work_that_may_end_anywhere_is_ended_at_once() -> None:
    code = """
import os, signal, time
from asft_nemo import stop_signal
stop_signal.listen(at_once=lambda: os._exit(7))
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(20)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=240).returncode == 7


def test_a_signal_that_a_library_unblocks_is_heard_all_the_same() -> None:
    code = """
import os, signal
from asft_nemo import stop_signal
stop_signal.listen()
signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signal.SIGNALS)
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
assert stop_signal.heard(within=20)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=240).returncode == 0


def test_a_signal_within_the_question_is_heard_and_blocks_nothing() -> None:
    """An unblocked signal ahead of every line that `heard` runs, its locks held or not: the handler waits for none of them."""
    code = """
import faulthandler, os, signal, sys
from asft_nemo import stop_signal

lines = 0

def interrupt(frame, event, argument):
    global lines
    if event == "line":
        lines += 1
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass  # here Python calls the handler
    return interrupt

stop_signal.listen()
signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signal.SIGNALS)
faulthandler.dump_traceback_later(60, exit=True)
sys.settrace(interrupt)
stop_signal.heard()
sys.settrace(None)
assert lines > 0
assert stop_signal.heard(within=20)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=240).returncode == 0


def test_word_is_left_for_the_batch_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asft_nemo import stop_signal

    monkeypatch.delenv("ASFT_STOP_FILE", raising=False)
    stop_signal.say_stopped("step 3")  # nobody asked
    monkeypatch.setenv("ASFT_STOP_FILE", str(tmp_path / "stopped"))
    stop_signal.say_stopped("step 3")
    assert (tmp_path / "stopped").read_text() == "step 3\n"
