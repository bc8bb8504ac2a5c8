"""Settings as the words of a command line, and words as a shell's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
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


def shell_line(words: Sequence[str]) -> str:
    """One command; from the first setting on one word a line, so that a long one can be read."""
    quoted = [shlex.quote(word) for word in words]
    start = next((i for i, word in enumerate(words) if "=" in word), len(words))
    if len(" ".join(quoted)) <= 100 or start == len(words):
        return " ".join(quoted)
    return " \\\n  ".join([" ".join(quoted[:start]), *quoted[start:]])


def for_nodes(run: RunConfig) -> RunConfig:
    """The settings with every file and folder under its absolute name: nodes need not have this directory."""
    return replace(run, made_absolute(run))
