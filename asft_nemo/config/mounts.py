"""What the nodes' containers must see: every file and folder that the settings name, under its own name, and what links among them lead to."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from asft_nemo.config.facts import Facts
from asft_nemo.config.named_paths import FILES, FOLDERS, entries_of, is_path, named_paths
from asft_nemo.config.paths import hub_home
from asft_nemo.config.schema import RunConfig, walk

# NeMo-Run's batch scripts do not quote them; , and : are pyxis' own signs.
_NAME = re.compile(r"[A-Za-z0-9_./+@=%~-]+")
_PATTERN = re.compile(r"[*?\[]")


def mounts(run: RunConfig) -> list[str]:
    """`--container-mounts` of pyxis: what cluster.container_mounts lists, and what it does not cover yet."""
    listed = list(run.cluster.container_mounts)
    inside = [Path(mount.split(":")[1]) for mount in listed if ":" in mount]
    wanted = {target: source for _, source, target in _wanted(run)}
    for target in sorted(wanted, key=lambda path: (len(path.parts), path)):
        if not any(target.is_relative_to(other) for other in inside):
            inside.append(target)
            listed.append(f"{wanted[target]}:{target}")
    return listed


def variables(run: RunConfig) -> dict[str, Path]:
    """Folders of which the stages know by a variable: of published suites, and of what the hub's tools keep; absolute.

    The latter only for a container, which may have another home; and only where they are, for pyxis mounts nothing that is not there.
    """
    settings = dict(walk(run))
    named = {key: [entry for entry in entries_of(settings[key]) if not is_path(key, entry)] for key in FILES}
    found: dict[str, Path] = {}
    if named["eval.suites"] and (folder := _variable(run, "ASFT_DATA_DIR")):
        found["ASFT_DATA_DIR"] = Path(os.path.abspath(folder))
    if run.cluster.pyxis and any(named.values()):
        home = hub_home(_variable(run, "HF_HOME"))
        places = {"HF_HOME": home} | {
            name: _variable(run, name) for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE")
        }
        found |= {
            name: Path(os.path.abspath(place)) for name, place in places.items() if place and os.path.isdir(place)
        }  # fmt: skip
    return found


def _variable(run: RunConfig, name: str) -> str | None:
    """Its value in a stage."""
    given = dict(entry.split("=", 1) for entry in run.cluster.env if "=" in entry)
    return given.get(name, os.environ.get(name))


def image(name: str | None, start: Path) -> str | None:
    """An image as pyxis takes it.

    Args:
        name: a file, which starts with . or / or ends with .sqsh, or a registry's name as Docker or pyxis writes it.
        start: the directory that a file's name is relative to.

    Returns:
        A file's absolute path; otherwise the name with # behind the registry's host, for a / would be part of a name on Docker Hub. The
        first part is a host where it has a . or a : or is localhost, which is Docker's own rule.
    """
    if name is None or "#" in name or "://" in name:
        return name
    if name.startswith((".", "/")) or name.endswith(".sqsh"):
        return os.path.normpath(start / name)
    host, slash, rest = name.partition("/")
    return f"{host}#{rest}" if slash and (host == "localhost" or set(host) & set(".:")) else name


def _wanted(run: RunConfig) -> Iterator[tuple[str, Path, Path]]:
    """Who names it, the folder or file on the node, and its name in the container."""
    folder = Path(os.path.abspath(run.run.dir))
    yield "run.dir", folder, folder
    for name, place in variables(run).items():
        yield name, place, place
    for key, path in named_paths(run):
        top = path if key in FOLDERS else _around(path)
        yield key, top, top
        if key != "reference.cache_dir":  # large, and made without links
            for source, target in _linked(path):
                yield key, source, target


def _around(path: Path) -> Path:
    """The folder that holds a file, or all files that fit a pattern; a file of the root is mounted itself."""
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if _PATTERN.search(part)), len(parts) - 1)
    return Path(*parts[:first]) if first > 1 else path


def _linked(path: Path) -> Iterator[tuple[Path, Path]]:
    """Where links among the files of a folder, a file's name or a pattern lead to: a hub's snapshot is made of links to its blobs."""
    files = [path, *path.rglob("*")] if os.path.isdir(path) else [Path(name) for name in glob.glob(str(path), recursive=True)]  # fmt: skip
    for file in files:
        host, seen = file, file
        while os.path.islink(host) and os.path.exists(host):
            link = os.readlink(host)
            # In the container the folders above a mount are no links, so .. means what it says.
            seen = Path(os.path.normpath(seen.parent / link))
            host = Path(os.path.realpath((host.parent / link).parent)) / seen.name
            itself = os.path.isdir(host) or len(seen.parts) == 2  # all of / would hide the container's own
            source, target = (host, seen) if itself else (host.parent, seen.parent)
            yield (target if os.path.realpath(target) == os.path.realpath(source) else source), target


def unmountable(facts: Facts) -> Iterator[str]:
    """Rule: names that cannot be written into a batch script's line of srun for pyxis."""
    run = facts.run
    if not run.cluster.pyxis:
        return
    names = {(key, str(path)) for key, *pair in _wanted(run) if key != "run.dir" for path in pair}
    names |= {
        ("cluster.container_mounts", part)
        for mount in run.cluster.container_mounts
        for part in mount.split(":")
    }
    for name in ("container_image", "eval_image"):
        whole = image(getattr(run.cluster, name), Path.cwd())
        names |= {(f"cluster.{name}", re.sub("[:#]", "/", whole))} if whole else set()
    for key, name in sorted(names):
        if not _NAME.fullmatch(name):
            yield (
                f"{key} needs {name} in the container, and pyxis cannot be given a name with such characters: use a path of letters, "
                "digits and _ . + @ = % ~ - alone"
            )
