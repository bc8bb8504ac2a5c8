"""A tokenizer whose control tokens go by names that no record can contain.

Ordinary tokenizers turn the text `<|im_end|>` into a control token wherever it stands, in a user's message too.
Here every control token is renamed: its name stands between two characters of Unicode's private use area that
records may not hold. So a template's own marks, written in guards by `mark`, become control tokens, and the same text
without guards is text like any other. Renamed are the names alone: ids, splitting, normalisation and merging stay the tokenizer's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

OPEN, CLOSE = "\U000f0000", "\U000f0001"
# Characters with a meaning of our own; a record that holds one is a bad row.
RESERVED = re.compile("[\U000f0000-\U000f00ff]")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # pieces of byte fallback, which the model itself looks up by name


def guarded(name: str) -> str:
    """A control token's new name."""
    return OPEN + name + CLOSE


def control_pattern(names: Iterable[str]) -> re.Pattern[str] | None:
    """Finds control tokens' names in text, the longest where several begin; None where there are none."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def marked_tokenizer(original: Tokenizer) -> tuple[Tokenizer, dict[int, int], dict[int, str]]:
    """The renamed copy.

    Args:
        original: the tokenizer; not changed.

    Returns:
        the copy; its ids of added tokens to the original's, where they differ; and the control tokens as the
        original's ids to their names.
    """
    form: dict[str, Any] = json.loads(original.to_str())
    added = [token for token in form["added_tokens"] if not _BYTE.fullmatch(token["content"])]
    control = {token["id"]: token["content"] for token in added if token["special"]}
    new_names = {name: guarded(name) for name in control.values()}
    original_ids = {new_names.get(token["content"], token["content"]): token["id"] for token in added}
    for token in added:
        token["content"] = new_names.get(token["content"], token["content"])
    form["added_tokens"], form["truncation"], form["padding"] = added, None, None
    model = form["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {new_names.get(piece, piece): number for piece, number in vocab.items()}
    else:  # Unigram: pieces with scores, the id is the place
        model["vocab"] = [[new_names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in new_names:
        model["unk_token"] = new_names[model["unk_token"]]
    copy = Tokenizer.from_str(json.dumps(form, ensure_ascii=False))
    moved = {
        number: original_ids[token.content]
        for number, token in copy.get_added_tokens_decoder().items()
        if number != original_ids[token.content]
    }
    return copy, moved, control
