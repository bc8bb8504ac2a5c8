"""typings/ says of heavy libraries what the project uses of them: the names are theirs, and so are the parameters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "typings"
CHECK = """
import ast, importlib, inspect, pathlib, sys

folder, package = pathlib.Path(sys.argv[1]), sys.argv[2]
wrong = []

def parameters(module, path, theirs, node):
    known = inspect.signature(theirs).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in known):
        return
    asked = {one.arg for one in (*node.args.args, *node.args.kwonlyargs)} - {"self", "cls"}
    wrong.extend(f"{module}.{path}({name})" for name in asked - {one.name for one in known})

def compare(module, path, owner, nodes):
    for node in nodes:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        name = node.name
        if name.startswith("_") and name != "__init__":
            continue
        theirs, inner = getattr(owner, name, None), f"{path}{name}"
        if theirs is None:
            wrong.append(f"{module}.{inner}")
        elif isinstance(node, ast.ClassDef):
            compare(module, f"{inner}.", theirs, node.body)
        else:
            parameters(module, inner, owner if name == "__init__" else theirs, node)

for file in sorted((folder / package).rglob("*.pyi")):
    parts = file.relative_to(folder).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    compare(name, "", importlib.import_module(name), ast.parse(file.read_text()).body)
print("\\n".join(wrong))
"""


@pytest.mark.long
@pytest.mark.skipif(not FOLDER.is_dir(), reason="no typings here: not a clone")
@pytest.mark.parametrize(
    "package", [folder.name for folder in sorted(FOLDER.glob("*")) if folder.is_dir()] or ["none"]
)
def test_names_and_parameters_are_the_librarys(package: str, tmp_path: Path) -> None:
    """In a process of its own, because these take seconds to import."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK, str(FOLDER), package],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
    )
    if f"No module named '{package}'" in done.stderr:
        pytest.skip(f"{package} is not installed")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == []
