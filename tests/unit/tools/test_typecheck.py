"""Which files are type-checked again: those whose text, or the text of something that they import, is not as it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path.insert(0, str(TOOLS))

import typecheck  # noqa: E402

TREE = {
    "asft_nemo/__init__.py": "",
    "asft_nemo/low.py": "X = 1\n",
    "asft_nemo/middle.py": "from asft_nemo.low import X\n",
    "asft_nemo/nemo/__init__.py": "",
    "asft_nemo/nemo/top.py": "def late():\n    from ..middle import X\n    from . import beside\n",
    "asft_nemo/nemo/beside.py": "import torch\n",
    "eval/asft_eval/__init__.py": "",
    "eval/asft_eval/run.py": "import asft_eval.types\n",
    "eval/asft_eval/types.py": "",
    "recipes/__init__.py": "",
    "recipes/base.py": "",
    "recipes/tiny.py": "from . import base\n",
    "tools/bench/__init__.py": "",
    "tools/bench/measure.py": "",
    "tools/check/first.py": "import second\n",
    "tools/check/inner/third.py": "from second import Y\n",
    "tools/check/second.py": "",
    "tools/bench_step.py": "from bench import measure\nfrom asft_nemo import late_one\n",
    "typings/wandb/__init__.pyi": "",
    "requirements/base.txt": "torch==2\n",
    "pyproject.toml": "[tool.pyright]\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ("asft_nemo/low.py", ["asft_nemo/low.py", "asft_nemo/middle.py", "asft_nemo/nemo/top.py"]),
        ("asft_nemo/nemo/beside.py", ["asft_nemo/nemo/beside.py", "asft_nemo/nemo/top.py"]),
        ("eval/asft_eval/types.py", ["eval/asft_eval/run.py", "eval/asft_eval/types.py"]),
        ("recipes/base.py", ["recipes/base.py", "recipes/tiny.py"]),
        ("tools/bench/measure.py", ["tools/bench/measure.py", "tools/bench_step.py"]),
        ("tools/bench_step.py", ["tools/bench_step.py"]),
        ("asft_nemo/late_one.py", ["asft_nemo/late_one.py", "tools/bench_step.py"]),
        (
            "tools/check/second.py",
            ["tools/check/first.py", "tools/check/inner/third.py", "tools/check/second.py"],
        ),
        ("tools/check/first.py", ["tools/check/first.py"]),
        ("pyproject.toml", None),
        ("requirements/vllm.txt", []),
        ("tests/test_x.py", []),
        ("requirements/base.txt", None),
        ("typings/wandb/__init__.pyi", None),
        ("typings/new/__init__.pyi", None),
    ],
)
def test_what_is_checked_again(tree: Path, changed: str, again: list[str] | None) -> None:
    before = typecheck.digests(tree)
    (tree / changed).parent.mkdir(exist_ok=True)
    (tree / changed).write_text("[tool.pyright]\nY = 2\n" if changed == "pyproject.toml" else "Y = 2\n")
    after = typecheck.digests(tree)
    differ = sorted(str(file.relative_to(tree)) for file in after if after[file] != before.get(file))
    every = sorted(name for name in TREE if name.endswith(".py"))
    assert differ == (every if again is None else again)


def test_all_is_checked_again_after_stubs_are_renamed(tree: Path) -> None:
    before = typecheck.digests(tree)
    (tree / "typings" / "wandb").rename(tree / "typings" / "wandc")
    after = typecheck.digests(tree)
    assert not [file for file in after if after[file] == before[file]]


def test_all_that_pyproject_includes_is_there() -> None:
    root = TOOLS.parent
    lines = (root / "pyproject.toml").read_text().splitlines()
    (include,) = (line for line in lines if line.startswith("include = [") and "tools" in line)
    assert include == "include = " + json.dumps(list(typecheck.FOLDERS))
    assert root / "tools" / "typecheck.py" in typecheck.modules(root).values()
