"""What the stage `prepare` makes of a run's data entries, and whether what an earlier launch has left is that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asft_nemo.config.hub_ids import hub_id
from asft_nemo.config.schema import RunConfig, walk
from asft_nemo.errors import DataError, UserError

_MANIFEST = "manifest.json"


def entries(run: RunConfig) -> list[tuple[str, str]]:
    """Data entries that can be prepared, with the template each is read by."""
    data, found = run.data, []
    for files, templates in ((data.train, data.templates), (data.validation, data.validation_templates)):
        for index, entry in enumerate(files):
            ready = (Path(entry) / _MANIFEST).is_file() or (hub_id(entry) and not Path(entry).exists())
            if not ready and entry not in (name for name, _ in found):
                found.append((entry, templates[index] if templates else data.template))
    return found


def prepared_names(run: RunConfig) -> dict[str, str]:
    """Entry -> the name of its prepared directory: what the file is called, numbered where two are called alike."""
    names: dict[str, str] = {}
    for entry, _ in entries(run):
        stem = Path(entry).name.split(".")[0].replace("*", "all") or "data"
        taken = [name for name in names.values() if name.split("~")[0] == stem]
        names[entry] = f"{stem}~{len(taken) + 1}" if taken else stem
    return names


def prepared_dir(folder: Path, name: str) -> Path:
    """Where the stage `prepare` leaves an entry."""
    return folder / "data" / name


def is_prepared(run: RunConfig, folder: Path) -> bool:
    """Whether an earlier launch has prepared all data of this run.

    Raises:
        UserError: directories of these names are there, and one was made from other files or with other settings.
    """
    names = prepared_names(run)
    targets = {entry: prepared_dir(folder, name) for entry, name in names.items()}
    if not targets or not all((target / _MANIFEST).is_file() for target in targets.values()):
        return False
    for entry, template in entries(run):
        settings = {**dict(walk(run.data, "data.")), "data.template": template}
        problem = _other(targets[entry] / _MANIFEST, entry, settings)
        if problem is not None:
            raise UserError(
                f"{targets[entry]} {problem}: add prepare to --stages, which makes what is missing, or choose another run.dir"
            )
    return True


def _other(manifest: Path, entry: str, settings: Mapping[str, Any]) -> str | None:
    """What a prepared directory was made from, where it is not this entry as the run reads it now."""
    try:
        made = json.loads(manifest.read_text(encoding="utf-8"))
        before = [
            (str(Path(source["name"]).absolute()), source["bytes"], source["modified_ns"])
            for source in made["sources"]
        ]
        with_settings = dict(made["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"holds a manifest that cannot be read, and the run reads {entry}"
    now = _files(entry)
    if [name for name, *_ in before] != [str(path) for path in now]:
        first = f"{before[0][0]}{' and others' if len(before) > 1 else ''}" if before else "nothing"
        return f"was prepared from {first}, and the run reads {entry}"
    states = {path: path.stat() for path in now if path.exists()}  # a dry run need not see them
    if any(
        states[path].st_size != size or states[path].st_mtime_ns != modified
        for path, (_, size, modified) in zip(now, before, strict=True)
        if path in states
    ):
        return f"was prepared from {entry} before it changed"
    for key, value in with_settings.items():
        if settings.get(key) != value:
            return (
                f"was prepared with {key}={_shown(value)}, and the run has {key}={_shown(settings.get(key))}"
            )
    return None


def _files(entry: str) -> list[Path]:
    """The files that an entry stands for, absolute."""
    from asft_nemo.data.files import expand  # brings torch along, which only such a launch waits for

    try:
        return [path.absolute() for path in expand(entry)]
    except DataError:
        return [Path(entry).absolute()]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
