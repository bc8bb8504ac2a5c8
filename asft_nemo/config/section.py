"""What a group of settings is: a dataclass that freezes once, and how it becomes plain values and comes back from them."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

REQUIRED: Any = "???"  # OmegaConf's marker for a mandatory value


class Section:
    """A group of settings that can be frozen once."""

    def __setattr__(self, name: str, value: object) -> None:
        if self.__dict__.get("_frozen", False):
            raise dataclasses.FrozenInstanceError(
                f"{type(self).__name__}.{name} is frozen: make a changed copy with config.schema.replace"
            )
        if name not in type(self).__annotations__:
            raise AttributeError(f"{type(self).__name__} has no setting '{name}'")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"{type(self).__name__}.{name} cannot be deleted")

    def freeze(self) -> None:
        """Makes this section and all sections below it immutable; lists become tuples."""
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, Section):
                value.freeze()
            elif isinstance(value, list):
                setattr(self, item.name, tuple(value))
        self.__dict__["_frozen"] = True


def walk(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings as (dotted key, value), in the order of the schema."""
    for item in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, item.name)
        if isinstance(value, Section):
            yield from walk(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value


@functools.cache  # resolving them takes most of the time of a changed copy, and the planner makes hundreds
def hints(cls: type[Section]) -> dict[str, Any]:
    """The resolved types of a section's fields."""
    return typing.get_type_hints(cls)


def plain(value: Any) -> Any:
    """A section and all below it as plain JSON values; tuples become lists."""
    if isinstance(value, Section):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}  # type: ignore[arg-type]
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def build(cls: type[Any], values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """A section from nested plain values, not yet frozen.

    Args:
        cls: the section's class.
        values: by the names of its fields.
        prefix: of its keys, in sentences.
        problems: gets a sentence for each key that does not exist and each value of the wrong type.
    """
    section = cls()
    types_of = hints(cls)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in types_of:
            problems.append(f"{key} is not a setting: {prefix or 'the top level '}has {', '.join(types_of)}")
            continue
        kind = types_of[name]
        if isinstance(kind, type) and issubclass(kind, Section):
            if isinstance(value, Mapping):
                setattr(section, name, build(kind, value, f"{key}.", problems))
            else:
                problems.append(f"{key}={value!r} is a section: set {key}.<name>=... instead")
            continue
        converted, fits = _convert(kind, value)
        if fits:
            setattr(section, name, converted)
        else:
            problems.append(f"{key}={value!r} is not {describe_type(kind)}")
    return section


def _convert(kind: Any, value: Any) -> tuple[Any, bool]:
    """The value in the field's type, and whether it fits."""
    if value == REQUIRED:
        return value, True
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(kind):
            converted, fits = _convert(option, value)
            if fits:
                return converted, True
        return value, False
    if kind is type(None):
        return None, value is None
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return value, False
        pairs = [_convert(typing.get_args(kind)[0], item) for item in value]
        return tuple(item for item, _ in pairs), all(fits for _, fits in pairs)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value), True
    return value, type(value) is kind


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
_PLURALS = {str: "texts", float: "numbers"}


def describe_type(kind: Any) -> str:
    """A field's type in words."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(option) for option in typing.get_args(kind))
    if origin is tuple:
        return f"a list [...] of {_PLURALS[typing.get_args(kind)[0]]}"
    return _NAMES.get(kind, str(kind))
