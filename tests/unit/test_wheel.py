"""The wheel holds two packages, and inside one of them the files that a clone has beside it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACE = "asft_nemo/_project/"  # asft_nemo.config.paths.SHIPPED
NEEDED = (
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "asft_nemo",
    "eval",
    "conf",
    "recipes",
    "assets",
)

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="no setup.py here: not a clone"),
    pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="no setuptools here"),
]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, built from a copy: setuptools leaves folders in the tree that it builds from."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        else:
            shutil.copy2(ROOT / name, tree)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = out.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(out / "files")
    return out / "files"


def files(folder: Path, prefix: str = "") -> set[str]:
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {f"{prefix}{file}" for file in found if "__pycache__" not in file.parts}


def test_it_holds_the_packages_and_what_they_read_and_nothing_else(unpacked: Path) -> None:
    found = {name for name in files(unpacked) if ".dist-info/" not in name}
    modules = {f"asft_nemo/{name}" for name in files(ROOT / "asft_nemo")}
    modules |= {f"asft_eval/{name}" for name in files(ROOT / "eval" / "asft_eval")}
    shipped = files(ROOT / "conf", f"{PLACE}conf/") | files(ROOT / "recipes", f"{PLACE}recipes/")
    shipped |= {name for name in files(ROOT / "assets", f"{PLACE}assets/") if not name.endswith(".png")}
    assert {name for name in modules if name.endswith(".py")} | shipped == found
    (record,) = unpacked.glob("*.dist-info/top_level.txt")
    assert record.read_text().split() == ["asft_eval", "asft_nemo"]


def test_settings_are_composed_from_it_far_from_a_clone(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "from asft_nemo.config.load import compose; from asft_nemo.config.paths import project_dir;"
        "compose(['experiment=tiny', 'run.dir=run']); print(project_dir())"
    )
    # PYTHONPATH comes before an editable installation of the clone
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(unpacked), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == unpacked / "asft_nemo" / "_project"
