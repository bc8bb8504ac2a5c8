"""From the command line's overrides to one immutable RunConfig.

Four levels, later ones win: schema < recipe < experiment < command line. A group file (`objective=asft` picks
conf/objective/asft.yaml) counts at the level that chose it. Hydra parses the overrides and composes each
level; the levels are merged setting by setting into the schema, so that every misspelt key and every wrong
type is found, named and reported together.
"""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from asft_nemo.config import rules
from asft_nemo.config.facts import Level
from asft_nemo.config.model_shape import ModelShape
from asft_nemo.config.paths import project_dir
from asft_nemo.config.recipes import known_recipes, listed, recipe_fragment, suggest
from asft_nemo.config.schema import DERIVED, RunConfig, Section, describe_type, from_dict, hints
from asft_nemo.errors import ConfigError

# `${project:assets/...}` in a group file: what ships with the project, wherever it is installed.
OmegaConf.register_new_resolver("project", lambda name: str(project_dir() / name), replace=True)

_LEVEL = "_level"  # Hydra's primary config for a level that chooses only what it is told to choose


@dataclass
class _CommandLine:
    """The parsed overrides: chosen groups (the experiment among them) and single settings."""

    groups: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def compose(
    overrides: Sequence[str],
    *,
    conf_dir: str | Path | None = None,
    check_inputs: bool = True,
    launched: bool = False,
    assumed: Mapping[str, Any] | None = None,
    shape_of: Callable[[RunConfig], ModelShape | None] | None = None,
) -> RunConfig:
    """The run that a list of overrides describes, checked by every rule.

    Args:
        overrides: `key=value` in Hydra's grammar, for example `["recipe=tiny_cpu", "objective=asft"]`.
        conf_dir: folder with config.yaml and the groups; None = the project's conf/.
        check_inputs: also check what lies outside the settings: files, run.dir, what the machine can run.
        launched: for `asft launch`: also check the cluster.
        assumed: dotted keys that count as given below every level, for a command that can do without their values.
        shape_of: where such a command has the model's sizes from; None, or an answer of None = from model.path.

    Raises:
        ConfigError: unknown names and keys, wrong types, broken rules; all of one kind reported together.
    """
    folder = Path(conf_dir).resolve() if conf_dir is not None else project_dir() / "conf"
    line = _parse(overrides, folder)
    defaults = _compose_level(folder, "config", {})
    experiment = _compose_level(folder, _LEVEL, _only(line.groups, "experiment"))
    choices = {group: name for group, name in line.groups.items() if group != "experiment"}
    command_line = [*_leaves(_compose_level(folder, _LEVEL, choices)), *line.settings.items()]
    experiment["experiment"] = line.groups.get("experiment")
    recipe = line.settings.get("recipe", experiment.get("recipe"))
    if recipe is None:
        kinds = dict(_kinds(RunConfig))
        unknown = filter(None, (_key_problem(key, kinds) for key in line.settings))
        raise ConfigError(
            [
                *unknown,
                f"no recipe is given: set recipe=tiny_cpu ({listed(known_recipes())}), or an experiment=... that names one",
            ]
        )
    levels = (
        [*(assumed or {}).items(), *_leaves(defaults)],
        _leaves(recipe_fragment(str(recipe))),
        _leaves(experiment),
        command_line,
    )
    return _checked(levels, check_inputs=check_inputs, launched=launched, shape_of=shape_of)


def compose_from(
    settings: Mapping[str, Any], overrides: Sequence[str], *, source: str, check_inputs: bool = True
) -> RunConfig:
    """The run of settings that have been composed before, checked by every rule; conf/ and recipes/ have no say in it.

    Args:
        settings: all settings, nested.
        overrides: single settings that are to be others, `key=value`.
        source: of the settings, in sentences.
        check_inputs: as `compose`.

    Raises:
        ConfigError: as `compose`; or an override would choose files of conf/ or recipes/.
    """
    line = _parse(overrides, project_dir() / "conf")
    chosen = [name for name in (*line.groups, "recipe") if name in line.groups or name in line.settings]
    if chosen:
        raise ConfigError(
            f"{source} holds settings that are composed already, and {', '.join(f'{name}=...' for name in chosen)} would compose others: "
            "give single settings such as optim.lr=1e-5, or leave --settings out"
        )
    return _checked((_leaves(settings), (), (), list(line.settings.items())), check_inputs=check_inputs)


def _checked(
    levels: Sequence[Sequence[tuple[str, Any]]],
    *,
    check_inputs: bool,
    launched: bool = False,
    shape_of: Callable[[RunConfig], ModelShape | None] | None = None,
) -> RunConfig:
    """The run of these levels; arguments and errors as `compose`."""
    run, level_of, problems = _merge(levels)
    shape = None if shape_of is None else shape_of(run)
    try:
        rules.check(run, level_of=level_of, shape=shape, check_inputs=check_inputs, launched=launched)
    except ConfigError as error:
        # What rules say of a setting that is not given has been said.
        problems += [text for text in error.violations if not any(place in text for place in _PLACES)]
    if problems:
        raise ConfigError(problems)
    return run


def known_options(group: str, *, conf_dir: str | Path | None = None) -> tuple[str, ...]:
    """Names of a group's files, sorted, for example `known_options("objective")`."""
    folder = (Path(conf_dir) if conf_dir is not None else project_dir() / "conf") / group
    files = [file for file in folder.rglob("*.yaml") if not file.name.startswith("_")]  # `_` = part of others
    return tuple(sorted(str(file.relative_to(folder).with_suffix("")) for file in files))


def _parse(overrides: Sequence[str], folder: Path) -> _CommandLine:
    line, problems = _CommandLine(), []
    groups = {path.name for path in folder.iterdir() if path.is_dir()}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            problems.append(
                f"cannot read '{text}': write key=value, and lists as key=[a,b], quoted for the shell"
            )
            continue
        problem = _form_problem(override, text) or _misspelt_group(override.key_or_group, groups)
        if problem is None and override.key_or_group in groups:
            problem = _group_problem(override, folder)
            line.groups[override.key_or_group] = str(override.value())
        elif problem is None:
            line.settings[override.key_or_group] = override.value()
        if problem is not None:
            problems.append(problem)
    if problems:
        raise ConfigError(problems)
    return line


def _form_problem(override: Override, text: str) -> str | None:
    """Forms of Hydra's grammar that have no meaning here."""
    if override.is_delete() or override.is_add() or override.is_force_add() or override.package is not None:
        return f"cannot use '{text}': every setting exists already, so write key=value without +, ~ or @"
    if override.is_sweep_override():
        return f"'{text}' would be several runs: write a list as {override.key_or_group}=[...]"
    return None


def _misspelt_group(key: str, groups: Collection[str]) -> str | None:
    """A key that is no setting and nearly a group's name, which `_key_problem` does not know."""
    if key in groups or key in hints(RunConfig) or "." in key:
        return None
    near = difflib.get_close_matches(key, groups, n=1, cutoff=0.7)
    return f"{key} is not a setting: did you mean {near[0]}?" if near else None


def _group_problem(override: Override, folder: Path) -> str | None:
    group, name = override.key_or_group, override.value()
    options = known_options(group, conf_dir=folder)
    return None if str(name) in options else f"unknown {group} '{name}': {suggest(str(name), options)}"


def _only(groups: Mapping[str, str], name: str) -> dict[str, str]:
    return {name: groups[name]} if name in groups else {}


def _compose_level(folder: Path, primary: str, choices: Mapping[str, str]) -> dict[str, Any]:
    """What the chosen group files (and an experiment's own choices) give, as nested plain values."""
    if primary == _LEVEL and not choices:
        return {}
    groups = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "experiment")
    # The experiment comes last so that its body wins over the group files it chose.
    ConfigStore.instance().store(
        name=_LEVEL, node={"defaults": [*({group: None} for group in groups), {"experiment": None}, "_self_"]}
    )
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            composed = hydra_compose(
                primary, overrides=[f"{group}={name}" for group, name in choices.items()]
            )
            return cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        chosen = ", ".join(f"{group}={name}" for group, name in choices.items()) or "config.yaml"
        reason = " ".join(str(error).split())
        raise ConfigError(f"{chosen} cannot be composed from {folder}: {reason}") from error
    finally:
        GlobalHydra.instance().hydra = before


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested values as (dotted key, value); lists are values."""
    result: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            result += _leaves(value, f"{prefix}{name}.")
        else:
            result.append((f"{prefix}{name}", value))
    return result


def _merge(
    levels: Sequence[Sequence[tuple[str, Any]]],
) -> tuple[RunConfig, dict[str, Level], list[str]]:
    """Merges the levels into the schema; also says which level gave each setting, and what is not given.

    What is not given of `_CURES` has its place taken, so that the rules can look at the rest: all that is wrong is said at once.
    """
    tree = copy.deepcopy(_schema())
    kinds = dict(_kinds(RunConfig))
    level_of: dict[str, Level] = {}
    problems: list[str] = []
    for level, leaves in zip(Level, levels, strict=True):
        for key, value in leaves:
            problem = _key_problem(key, kinds) or _set(tree, key, value, kinds[key])
            if problem is not None:
                problems.append(problem)
            else:
                level_of[key] = level
    if problems:
        raise ConfigError(problems)
    _resolve_levels(tree, level_of)
    missing = [key for key in kinds if key not in DERIVED and OmegaConf.is_missing(*_locate(tree, key))]
    problems = [f"{key} is not set: {_CURES.get(key, f'give {key}=...')}" for key in missing]
    for key in missing:
        if key not in _CURES:
            raise ConfigError(problems)
        section, name = _locate(tree, key)
        section[name] = _place(key)
    return from_dict(cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))), level_of, problems


@functools.cache
def _schema() -> DictConfig:
    """The schema's defaults as OmegaConf has them; made once, for that takes five times as long as copying it."""
    return OmegaConf.structured(RunConfig)


def _kinds(cls: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings as (dotted key, type)."""
    for name, kind in hints(cls).items():
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _kinds(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _key_problem(key: str, kinds: Mapping[str, Any]) -> str | None:
    if key in kinds:
        return None
    inside = [known for known in kinds if known.startswith(f"{key}.")]
    if inside:
        return f"{key} is a section: set one of {', '.join(inside)}"
    section = key.rpartition(".")[0]
    near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.7)
    if not near:  # the right name in the wrong section, for example lr instead of optim.lr
        last = key.rpartition(".")[2]
        near = [known for known in kinds if known.rpartition(".")[2] == last]
    siblings = [known for known in kinds if known.rpartition(".")[0] == section]
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(siblings or kinds)}"
    return f"{key} is not a setting: {hint}"


def _locate(tree: DictConfig, key: str) -> tuple[DictConfig, str]:
    section, _, name = key.rpartition(".")
    return (OmegaConf.select(tree, section) if section else tree), name


def _set(tree: DictConfig, key: str, value: Any, kind: Any) -> str | None:
    section, name = _locate(tree, key)
    try:
        section[name] = value
    except OmegaConfBaseException:
        shown = "null" if value is None else repr(value)
        return f"{key}={shown} is not {describe_type(kind)}"
    return None


def _resolve_levels(tree: DictConfig, level_of: Mapping[str, Level]) -> None:
    """Settles the pairs of settings where the level decides which one speaks."""
    steps, epochs = (level_of.get(f"trainer.{name}", Level.SCHEMA) for name in ("max_steps", "epochs"))
    if epochs > steps:
        tree.trainer.max_steps = None
    name = None if OmegaConf.is_missing(tree.objective, "name") else tree.objective.name
    reads = name is None or rules.reads_reference(name, tree.objective.kl_weight)
    if level_of.get("reference.form", Level.SCHEMA) == Level.RECIPE and not reads:
        tree.reference.form = "none"


_CURES = {
    "objective.name": "set objective=asft (or sft, dft, sft_kl); there is no silent default",
    "model.path": "set model.path=<directory of the Hugging Face checkpoint the recipe is made for>",
}


def _place(key: str) -> str:
    return f"<{key}>"


_PLACES = tuple(map(_place, _CURES))
