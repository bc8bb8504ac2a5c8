"""Units after a number: taken off, and told apart where both sides name one that is known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

_SPELLINGS = (
    ("mm", "mm millimeter millimeters millimetre millimetres"),
    ("cm", "cm centimeter centimeters centimetre centimetres"),
    ("m", "m meter meters metre metres"),
    ("km", "km kilometer kilometers kilometre kilometres"),
    ("in", "in inch inches"),
    ("ft", "ft foot feet"),
    ("mi", "mi mile miles"),
    ("s", "s sec secs second seconds"),
    ("min", "min mins minute minutes"),
    ("h", "h hr hrs hour hours"),
    ("day", "day days"),
    ("week", "week weeks"),
    ("month", "month months"),
    ("year", "yr yrs year years"),
    ("g", "g gram grams"),
    ("kg", "kg kilogram kilograms"),
    ("l", "l liter liters litre litres"),
    ("ml", "ml milliliter milliliters"),
    ("cent", "cent cents"),
    ("$", "dollar dollars usd"),
)
UNITS: Mapping[str, str] = MappingProxyType(
    {word: unit for unit, words in _SPELLINGS for word in words.split()}
)
"""Spelling -> unit."""

_POWER = r"(?:\s*\^\s*\{?\s*(?P<power>[23])\s*\}?)?"
_IN_TEXT = re.compile(rf"^(?P<value>.*[\d)}}\]])\s*\\text\s*\{{(?P<unit>[^{{}}]*)\}}{_POWER}\s*$", re.DOTALL)
_PLAIN = re.compile(
    rf"^(?P<value>[-+]?[\d.,/]+)\s*(?P<unit>(?:[A-Za-z]{{2,}}|[mshgl])(?:[ /][A-Za-z]+)*){_POWER}\s*$"
)
_WORDS = MappingProxyType({"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cubed": "3"})
_WORDED = re.compile(
    r"(?:(?P<before>square|sq|cubic)\.?\s+)?(?P<unit>.*?)(?:\s+(?P<after>squared|cubed)|\s*\^\s*(?P<power>[23]))?"
)


def split_unit(text: str) -> tuple[str, str]:
    r"""`5\text{ cm}^2` as `5` and `cm^2`, `12 dollars` as `12` and `$`; an unknown unit is empty, and so is none."""
    plain = text.replace("²", "^2").replace("³", "^3")
    match = _IN_TEXT.match(plain) or _PLAIN.match(plain)
    if match is None:
        return text, ""
    spelled = match["unit"].strip().lower().rstrip(".")
    if spelled in ("and", "or", "to"):
        return text, ""
    return match["value"].strip(), _known(spelled, match["power"])


def _known(spelled: str, power: str | None) -> str:
    """The unit with its power, which may stand after it or be a word: `square centimeters` is `cm^2`."""
    words = _WORDED.fullmatch(spelled)
    if words is None or words["unit"] not in UNITS:
        return ""
    power = power or words["power"] or _WORDS.get(words["before"] or words["after"], "")
    return UNITS[words["unit"]] + (f"^{power}" if power else "")
