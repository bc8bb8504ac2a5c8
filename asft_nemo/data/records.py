"""From a row to a conversation. Adding a record form = one function + one row of `FORMS`.

`data.fields` says which fields to read. Where it says nothing, the first row of each file shows the form of all its rows. A row that does
not fit is a bad row with its reason; nothing here raises for a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from asft_nemo.config.schema import FieldsConfig
from asft_nemo.data.marking import RESERVED

Row = Mapping[str, Any]
Message = dict[str, Any]  # role and content at least

# Who may speak after whom; None is the beginning.
_NEXT: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """What a row says: messages with `role` (system, user, assistant, tool) and `content`; the last is the assistant's."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()  # descriptions of functions, for chat templates that show them

    def pair(self) -> tuple[str, str] | None:
        """Prompt and response, or None where there is more than that."""
        if [message["role"] for message in self.messages] != ["user", "assistant"] or self.tools:
            return None
        prompt, response = self.messages
        return None if "tool_calls" in response else (prompt["content"], response["content"])


Reader = Callable[[Row], "Conversation | str"]


class Form(NamedTuple):
    """A kind of rows: what it is called, the fields that tell it, how a row is read."""

    name: str
    needs: tuple[str, ...]
    read: Reader
    cures: Mapping[str, str] = {}  # the setting that names a field, where the user named it


def form_of(row: Row, fields: FieldsConfig) -> Form | None:
    """The form of a file whose first row this is: what `data.fields` says, else the first of `FORMS` that fits."""
    if fields.messages is not None:
        name = fields.messages
        return Form("data.fields", (name,), _conversation(name), {name: "messages"})
    if fields.prompt is not None and fields.response is not None:
        read = _pair(fields.prompt, fields.response, fields.input)
        cures = {fields.response: "response", fields.prompt: "prompt"}
        return Form("data.fields", (fields.prompt, fields.response), read, cures)
    return next((form for form in FORMS if all(name in row for name in form.needs)), None)


def no_form(row: Row) -> str:
    """Why a row has no form."""
    return f"its fields are {_fields(row)}, which is no known form: set data.fields.prompt and data.fields.response"


def read_row(row: Row, form: Form) -> Conversation | str:
    """The conversation of a row of this form, or why there is none."""
    for name in form.needs:
        if name not in row:
            cure = form.cures.get(name)
            if cure is not None:
                return f"no field '{name}', its fields are {_fields(row)}: set data.fields.{cure}"
            return (
                f"no field '{name}', its fields are {_fields(row)}, but the file begins with {form.name} rows"
            )
    return form.read(row)


def _fields(row: Row) -> str:
    return ", ".join(sorted(map(str, row))) or "none"


def _pair(prompt: str, response: str, extra: str | None = None) -> Reader:
    """Reads two fields; a third, where there is one and it is not blank, follows the prompt on a new line."""

    def read(row: Row) -> Conversation | str:
        reason = _not_text(row, prompt) or _not_text(row, response)
        if reason is not None:
            return reason
        text = row[prompt]
        if extra is not None and row.get(extra) not in (None, ""):
            reason = _not_text(row, extra, may_be_blank=True)
            if reason is not None:
                return reason
            text = f"{text}\n{row[extra]}" if row[extra].strip() else text
        return _exchange(text, row[response])

    return read


def _exchange(prompt: str, response: str) -> Conversation:
    return Conversation(({"role": "user", "content": prompt}, {"role": "assistant", "content": response}))


def _medmcqa(row: Row) -> Conversation | str:
    """The medical evaluation's own prompt; the explanation and, on a new line, the answer's letter."""
    texts = ("question", "opa", "opb", "opc", "opd", "exp")
    for name in texts:
        reason = _not_text(row, name)
        if reason is not None:
            return reason
    if type(row["cop"]) is not int or not 0 <= row["cop"] <= 3:
        return f"field 'cop' is {_shown(row['cop'])} where 0, 1, 2 or 3 is needed (0 is A)"
    options = "".join(f"\n{letter}. {row[name]}" for letter, name in zip("ABCD", texts[1:5], strict=True))
    return _exchange(
        f"Question: {row['question']}\n\nOptions:{options}\n\nAnswer:",
        f"{row['exp']}\nSo the answer to this question is {'ABCD'[row['cop']]}",
    )


def _conversation(name: str) -> Reader:
    """Reads a list of turns: `role` and `content` (OpenAI) or `from` and `value` (ShareGPT)."""

    def read(row: Row) -> Conversation | str:
        turns = row[name]
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            return f"field '{name}' is {kind(turns)} where an array of messages is needed"
        messages: list[Message] = []
        if isinstance(row.get("system"), str) and row["system"].strip():
            messages.append({"role": "system", "content": row["system"]})
        for number, turn in enumerate(turns, start=1):
            message = _message(turn)
            if isinstance(message, str):
                return f"message {number} of '{name}': {message}"
            before = messages[-1]["role"] if messages else None
            if message["role"] not in _NEXT[before]:
                place = f"after {before}" if before else "at the beginning"
                return (
                    f"message {number} of '{name}': roles out of order, {message['role']} {place} where "
                    f"{' or '.join(_NEXT[before])} is needed"
                )
            messages.append(message)
        if not messages or messages[-1]["role"] != "assistant":
            last = f"ends with {messages[-1]['role']}" if messages else "is empty"
            return f"field '{name}' {last}: its last message must be the assistant's, for nothing else is learned"
        tools = _tools(row.get("tools"))
        return tools if isinstance(tools, str) else Conversation(tuple(messages), tools)

    return read


def _message(turn: Any) -> Message | str:
    if not isinstance(turn, Mapping):
        return f"is {kind(turn)} where an object is needed"
    names = ("from", "value") if "from" in turn else ("role", "content")
    said = turn.get(names[0])
    if not isinstance(said, str) or said not in _ROLES:
        return f"{names[0]} is {_shown(said)} where one of {', '.join(_ROLES)} is needed"
    role = _ROLES[said]
    # Parquet and datasets fill the fields that a message does not have with null.
    message = {key: value for key, value in turn.items() if key not in names and value is not None}
    content = _joined(turn.get(names[1]))
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    else:
        reason = _not_text({names[1]: content}, names[1])
        if reason is not None:
            return reason
    if message.get("weight", 1) not in (0, 1):
        return f"weight is {_shown(message['weight'])} where 0 or 1 is needed"
    if not _clean(message):
        return _UNCLEAN
    return {**message, "role": role, "content": content}


def _joined(content: Any) -> Any:
    """OpenAI's content in parts as one text, where all parts are text."""
    if not isinstance(content, list) or not content:
        return content
    parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else content


def _tools(value: Any) -> tuple[Any, ...] | str:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return "field 'tools' is text that is no JSON"
    if value in (None, ""):
        return ()
    if not isinstance(value, list):
        return f"field 'tools' is {kind(value)} where an array is needed"
    return tuple(value) if _clean(value) else _UNCLEAN


_UNCLEAN = "holds half of a surrogate pair or a reserved character (U+F0000 to U+F00FF)"


def _clean(value: Any) -> bool:
    """Whether every text inside can be encoded and holds no character that is ours."""
    if isinstance(value, str):
        return _encodable(value) and not RESERVED.search(value)
    if isinstance(value, Mapping):
        return all(_clean(key) and _clean(inside) for key, inside in value.items())
    return all(map(_clean, value)) if isinstance(value, (list, tuple)) else True


def _not_text(row: Row, name: str, *, may_be_blank: bool = False) -> str | None:
    """Why a field is no text to learn from; None where it is."""
    value = row.get(name)
    if not isinstance(value, str):
        return f"field '{name}' is {kind(value)} where text is needed"
    if not may_be_blank and not value.strip():
        return f"field '{name}' is empty"
    if not _encodable(value):
        return f"field '{name}' holds half of a surrogate pair"
    found = RESERVED.search(value)
    if found is not None:
        return f"field '{name}' holds the reserved character U+{ord(found[0]):X}: leave it out"
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def kind(value: Any) -> str:
    """JSON's word for what a value is."""
    names = {
        bool: "true or false",
        int: "number",
        float: "number",
        str: "text",
        list: "array",
        dict: "object",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, (str, int, float)) else kind(value)


FORMS = (  # the first that fits
    Form("messages", ("messages",), _conversation("messages")),
    Form("conversations", ("conversations",), _conversation("conversations")),
    Form(
        "MedMCQA",
        ("question", "opa", "opb", "opc", "opd", "cop"),
        _medmcqa,
    ),
    Form("instruction/response", ("instruction", "response"), _pair("instruction", "response", "input")),
    Form("instruction/output", ("instruction", "output"), _pair("instruction", "output", "input")),
    Form("input/output", ("input", "output"), _pair("input", "output")),
    Form("question/answer", ("question", "answer"), _pair("question", "answer")),
    Form("prompt/response", ("prompt", "response"), _pair("prompt", "response")),
    Form("prompt/completion", ("prompt", "completion"), _pair("prompt", "completion")),
    Form("problem/solution", ("problem", "solution"), _pair("problem", "solution")),
    Form(
        "problem/generated_solution",
        ("problem", "generated_solution"),
        _pair("problem", "generated_solution"),
    ),
)
