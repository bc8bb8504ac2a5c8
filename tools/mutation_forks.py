"""Tries changes that mutmut has made of a tree: the tests are collected once, and every change runs in a fork of that process.

    cd WORK/mutants && python mutation_forks.py NAMES.json -- ARGUMENTS OF PYTEST

mutmut collects them anew for each change, which takes several times as long as what it takes until one fails. What mutmut noted is used: which tests call a
function, and how long they take. First come those that noticed the changes before, then one of each test function. What became of a change is written
beside its module as mutmut writes it. Ends with 1, and tries nothing, where a test fails without any change.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

#: Seconds of the processor's time; all tests of the losses take about 10.
LIMIT_S = 60
UNKNOWN_S = 0.1  # a test that mutmut has not timed


class Forks:
    """A plugin of pytest that runs the collected tests once for every change."""

    def __init__(self, names: Sequence[str]) -> None:
        noted = json.loads(Path("mutmut-stats.json").read_text())
        self.names = names
        self.seconds: dict[str, float] = noted["duration_by_test"]
        self.callers: dict[str, list[str]] = noted["tests_by_mangled_function_name"]
        self.noticed: Counter[str] = Counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In the place of pytest's own loop."""
        items = {item.nodeid: item for item in session.items}
        if self.tried("", list(items.values())) != 0:
            session.testsfailed = 1
            return True
        for name in self.names:
            tests = [test for test in self.callers.get(name.rpartition("__mutmut_")[0], ()) if test in items]
            code = self.tried(name, [items[test] for test in self.ordered(tests)]) if tests else 33
            write(name, code)
        return True

    def ordered(self, tests: Sequence[str]) -> list[str]:
        """What noticed most changes so far, then one of each test function, quick ones first."""
        seen: Counter[str] = Counter()
        keys: list[tuple[int, int, float, str]] = []
        for seconds, test in sorted((self.seconds.get(test, UNKNOWN_S), test) for test in tests):
            function = test.partition("[")[0]
            seen[function] += 1
            keys.append((-self.noticed[test], seen[function], seconds, test))
        return [test for *_, test in sorted(keys)]

    def tried(self, name: str, items: Sequence[pytest.Item]) -> int:
        """0 where no test fails under the change, 1 where one does, -n where signal n ended them."""
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.environ["MUTANT_UNDER_TEST"] = name
                resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 1))
                failed = first_that_fails(items)
                os.write(writing, failed.encode())
                code = 1 if failed else 0
            finally:
                os._exit(code)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            failed = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if failed:
            self.noticed[failed] += 1
        return code


def first_that_fails(items: Sequence[pytest.Item]) -> str:
    """Runs tests until one fails, and names it; empty where none does."""
    for number, item in enumerate(items):
        following = items[number + 1] if number + 1 < len(items) else None
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if item.session.testsfailed:
            return item.nodeid
    return ""


def write(name: str, code: int) -> None:
    """What became of a change, beside its module."""
    path = Path(*name.rpartition(".")[0].split("."))
    meta = next(
        found
        for found in (path.with_suffix(".py.meta"), path / "__init__.py.meta")
        if found.is_file() and name in json.loads(found.read_text())["exit_code_by_key"]
    )
    told = json.loads(meta.read_text())
    told["exit_code_by_key"][name] = code
    made = meta.with_name(meta.name + ".new")
    made.write_text(json.dumps(told, indent=4))
    made.replace(meta)


def main(words: Sequence[str]) -> int:
    """Returns the exit code of pytest."""
    names = json.loads(Path(words[0]).read_text())
    sys.path.insert(0, os.getcwd())
    quiet = ["-q", "--tb=no", "--assert=plain", "--capture=fd"]
    return int(pytest.main([*quiet, *words[2:]], plugins=[Forks(names)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
