"""Settings as the words of a command line, and words as a shell's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from asft_nemo.config.named_paths import made_absolute
from asft_nemo.config.schema import RunConfig, replace

_PLAIN = re.compile(r"[A-Za-z0-9_./-]+")
_LOOKS_OTHERWISE = re.compile(r"[-+]?[0-9._]+(e[-+]?[0-9]+)?|true|false|null|nan|[-+]?inf", re.IGNORECASE)


def setting(key: str, value: Any) -> str:
    """`key=value` in Hydra's grammar, whatever characters a text has."""
    return f"{key}={_value(value)}"


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_value(item) for item in value)}]"
    text = str(value)
    if not isinstance(value, str) or (_PLAIN.fullmatch(text) and not _LOOKS_OTHERWISE.fullmatch(text)):
        return text
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def without(words: Iterable[str], *keys: str) -> list[str]:
    """The words that set none of the keys; a key `a.` stands for all of its section, and for the group `a`."""
    return [word for word in words if not any(_sets(word.partition("=")[0], key) for key in keys)]


def _sets(name: str, key: str) -> bool:
    return name == key or (key.endswith(".") and (name.startswith(key) or name == key[:-1]))


def shell_line(words: Sequence[str]) -> str:
    """One command; from the first setting on one word a line, so that a long one can be read."""
    quoted = [shlex.quote(word) for word in words]
    start = next((i for i, word in enumerate(words) if "=" in word), len(words))
    if len(" ".join(quoted)) <= 100 or start == len(words):
        return " ".join(quoted)
    return " \\\n  ".join([" ".join(quoted[:start]), *quoted[start:]])


def for_nodes(run: RunConfig, words: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """The settings and the words that gave them, with every file and folder under its absolute name: nodes need not have this directory.

    Args:
        run: the settings.
        words: the command line's.
    """
    changed = made_absolute(run)
    absolute = [setting(key, value) for key, value in changed.items()]
    return replace(run, changed), [*without(words, *changed), *absolute]
