"""A rank that gives up is gone, whatever else fails: its threads would otherwise wait on."""

from __future__ import annotations

import subprocess
import sys

import pytest

from asft_nemo.leaving import USER_ERROR_EXIT

IN_A_THREAD = """
import os, sys, threading, time
import psutil
from asft_nemo import leaving
from asft_nemo.errors import UserError
{before}
threading.Thread(target=leaving.give_up, args=(UserError("rank 1 hangs"),), daemon=True).start()
time.sleep(20)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("os.environ['ASFT_ERROR_FILE'] = '/gone/error.json'", "error: rank 1 hangs"),
        ("sys.stderr.close()", ""),
        (
            "psutil.Process.children = lambda *_, **__: [psutil.Popen(['true'])]; psutil.Popen.kill = lambda child: (_ for _ in ()).throw(psutil.NoSuchProcess(1))",
            "error: rank 1 hangs",
        ),
    ],
    ids=["its file cannot be written", "nobody reads", "a child that has just gone"],
)
def test_a_thread_that_gives_up_ends_the_process(before: str, said: str) -> None:
    """The sentence is on stderr wherever that can be written."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_THREAD.format(before=before)],
        env={},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == USER_ERROR_EXIT, done.stderr
    assert said in done.stderr
