"""Types, checked where they can have changed: pyright on the files that differ, themselves or in what they import, from a state it found good.

    python tools/typecheck.py [--all]

A file's state is a digest of its text, of the texts of the project's files that it imports, directly or not, and of what else decides: pyright's
part of pyproject.toml, typings/ and the pins. What pyright found no fault with is remembered in .venv, by digest, so nothing is taken on trust
after a checkout or a merge either. `--all` forgets it, for an environment that was changed by hand. Reading everything takes pyright
the better part of a minute, most of it for libraries.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: `include` of pyproject.toml, and where imports of their modules begin
FOLDERS = {"asft_nemo": ".", "eval": "eval", "recipes": ".", "tools": "tools"}
DECIDES = ("typings/**/*.pyi", "requirements/base.txt", "requirements/dev.txt")
#: in the environment whose libraries the types are of; it goes with it
MEMORY = Path(sys.prefix) / ".typecheck"
KEPT = 20_000  # digests


def modules(root: Path) -> dict[str, Path]:
    """Module name -> file of all that is checked."""
    found: dict[str, Path] = {}
    for folder, start in FOLDERS.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root / start).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(module: str, file: Path) -> Iterator[str]:
    """Names that a file imports, absolute; of `from a import b` both `a` and `a.b`, for b may be a module.

    A name without dots in front is also looked for in the file's own folder and those above it, as pyright does.
    """
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names = [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
        else:
            continue
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        for end in range(1 if relative else len(package) + 1):
            yield from (".".join([*package[:end], name]) for name in names)


def digests(root: Path) -> dict[Path, str]:
    """File -> its state."""
    known = modules(root)
    texts = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in known.items()}
    direct = {name: _of_project(imported(name, file), known) for name, file in known.items()}
    settings = (root / "pyproject.toml").read_text().partition("[tool.pyright]\n")[2].partition("\n[")[0]
    common = [sys.version, settings]
    for pattern in DECIDES:
        common += [
            f"{file.relative_to(root).as_posix()} {file.read_text()}" for file in sorted(root.glob(pattern))
        ]
    shared = hashlib.sha256("\n".join(common).encode()).hexdigest()
    return {
        file: hashlib.sha256(
            "\n".join([shared, name, *(texts[one] for one in sorted(_reached(name, direct)))]).encode()
        ).hexdigest()
        for name, file in known.items()
    }


def _of_project(names: Iterator[str], known: Mapping[str, Path]) -> set[str]:
    """Those that are modules of the project, with the packages that they lie in, whose __init__ is read first."""
    every = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2)}
    return every & set(known)


def _reached(name: str, direct: Mapping[str, set[str]]) -> set[str]:
    seen, ahead = {name}, [name]
    while ahead:
        new = direct[ahead.pop()] - seen
        seen |= new
        ahead += new
    return seen


def faults(files: Sequence[str]) -> dict[str, list[str]]:
    """What pyright says against each file that it says something against.

    Raises:
        SystemExit: it gave no answer.
    """
    command = [str(Path(sys.executable).with_name("pyright")), "--threads", "2", "--outputjson", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        said = json.loads(done.stdout)["generalDiagnostics"]
    except (ValueError, KeyError):
        sys.exit(f"pyright did not answer ({done.returncode}): {done.stderr[-2000:] or done.stdout[-2000:]}")
    found: dict[str, list[str]] = {}
    for one in said:
        if one["severity"] == "error":
            place = f"{Path(one['file']).relative_to(ROOT)}:{one['range']['start']['line'] + 1}"
            found.setdefault(one["file"], []).append(
                f"{place}: {one['message']} ({one.get('rule', 'syntax')})"
            )
    if not found and done.returncode:
        sys.exit(f"pyright ended with {done.returncode}: {done.stderr[-2000:]}")
    return found


def remembered(file: Path) -> list[str]:
    """Digests that were found good, oldest first."""
    return file.read_text().split() if file.is_file() else []


def main() -> int:
    """Checks; exit code 1 where something is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every file, whatever is remembered")
    arguments = parser.parse_args()
    state, good = digests(ROOT), remembered(MEMORY)
    known = set() if arguments.all else set(good)
    asked = [str(file) for file, digest in state.items() if digest not in known]
    print(f"types: {len(asked)} of {len(state)} files are new, changed, or import one that is", flush=True)
    if not asked:
        return 0
    wrong = faults(asked)
    kept = dict.fromkeys([*good, *(digest for file, digest in state.items() if str(file) not in wrong)])
    MEMORY.write_text("\n".join(list(kept)[-KEPT:]) + "\n")
    print("\n".join(line for lines in wrong.values() for line in lines) or "types: no fault")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
