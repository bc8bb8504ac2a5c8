"""Forms of rows: told from the first row, read exactly, refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asft_nemo.config.schema import FieldsConfig
from asft_nemo.data import BadRow, Conversation, Record, read_records
from asft_nemo.data.records import FORMS, form_of, read_row

Writer = Callable[..., Path]
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
MEDMCQA = {"question": "Which?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2, "exp": "Because."}


def read(row: dict[str, Any], **fields: str) -> Conversation | str:
    form = form_of(row, FieldsConfig(**fields))
    assert form is not None
    return read_row(row, form)


PAIRS: list[tuple[dict[str, Any], tuple[str, str]]] = [
    ({"instruction": "a", "response": "b"}, ("a", "b")),
    ({"instruction": "a", "input": "x", "output": "b"}, ("a\nx", "b")),
    ({"instruction": "a", "input": "", "output": "b"}, ("a", "b")),
    ({"instruction": "a", "input": None, "output": "b"}, ("a", "b")),
    ({"instruction": "a", "output": "b"}, ("a", "b")),
    ({"input": "a", "output": "b"}, ("a", "b")),
    ({"question": "a", "answer": "b\n#### 3"}, ("a", "b\n#### 3")),
    ({"prompt": "a", "completion": "b"}, ("a", "b")),
    ({"prompt": "a", "response": "b"}, ("a", "b")),
    ({"problem": "a", "solution": "b", "answer": "3"}, ("a", "b")),
    ({"problem": "a", "generated_solution": "b", "expected_answer": "3"}, ("a", "b")),
    ({"messages": [USER, ASSISTANT], "problem": "x", "solution": "y"}, ("a", "b")),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ("a", "b")),
    ({"messages": [USER, {**ASSISTANT, "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]}]}, ("a", "bc")),
    (MEDMCQA, ("Question: Which?\n\nOptions:\nA. w\nB. x\nC. y\nD. z\n\nAnswer:", "Because.\nSo the answer to this question is C")),
]  # fmt: skip


@pytest.mark.parametrize(("row", "pair"), PAIRS)
def test_a_form_is_told_by_its_fields(row: dict[str, Any], pair: tuple[str, str]) -> None:
    conversation = read(row)
    assert isinstance(conversation, Conversation), conversation
    assert conversation.pair() == pair


def test_every_form_has_a_row_here() -> None:
    told = {form.name for row, _ in PAIRS if (form := form_of(row, FieldsConfig())) is not None}
    assert told == {form.name for form in FORMS}


def test_fields_that_are_named_win() -> None:
    row = {"messages": [USER, ASSISTANT], "q": "x", "c": "y", "a": "z"}
    named = read(row, prompt="q", response="a", input="c")
    assert isinstance(named, Conversation)
    assert named.pair() == ("x\ny", "z")
    dialogue = read({"dialogue": [USER, ASSISTANT]}, messages="dialogue")
    assert isinstance(dialogue, Conversation)
    assert dialogue.pair() == ("a", "b")


def test_conversations_keep_turns_roles_and_tools() -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
    }
    turns = [
        {"role": "developer", "content": "s"},
        USER,
        call,
        {"role": "tool", "content": "7", "tool_call_id": "1", "name": None},
        ASSISTANT,
    ]
    found = read({"messages": turns, "tools": [{"type": "function"}]})
    assert isinstance(found, Conversation)
    assert [message["role"] for message in found.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert found.messages[2]["tool_calls"] == call["tool_calls"]
    assert "name" not in found.messages[3]
    assert found.tools == ({"type": "function"},)
    assert found.pair() is None
    shared = read(
        {
            "system": "s",
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            "tools": "[]",
        }
    )
    assert isinstance(shared, Conversation)
    assert [message["content"] for message in shared.messages] == ["s", "a", "b"]


BAD = [
    ({"messages": "x"}, "field 'messages' is text where an array of messages is needed"),
    ({"messages": None}, "field 'messages' is null where"),
    ({"messages": []}, "field 'messages' is empty"),
    ({"messages": [USER]}, "field 'messages' ends with user: its last message must be the assistant's"),
    ({"messages": [ASSISTANT]}, "message 1 of 'messages': roles out of order, assistant at the beginning where system or user"),
    ({"messages": [USER, USER, ASSISTANT]}, "message 2 of 'messages': roles out of order, user after user where assistant is"),
    ({"messages": [USER, ASSISTANT, {"role": "system", "content": "x"}, ASSISTANT]}, "system after assistant"),
    ({"messages": [{"role": "human being", "content": "x"}]}, "message 1 of 'messages': role is 'human being' where one of"),
    ({"messages": [{"content": "x"}]}, "role is null where"),
    ({"messages": [3]}, "message 1 of 'messages': is number where an object is needed"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "field 'content' is null where text is needed"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "message 2 of 'messages': field 'content' is empty"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]}, "field 'content' is array where text"),
    ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "weight is 0.5 where 0 or 1 is needed"),
    ({"messages": [USER, {**ASSISTANT, "name": "\ud800"}]}, "half of a surrogate pair"),
    ({"messages": [USER, ASSISTANT], "tools": "{"}, "field 'tools' is text that is no JSON"),
    ({"messages": [USER, ASSISTANT], "tools": 3}, "field 'tools' is number where an array is needed"),
    ({"messages": [USER, ASSISTANT], "tools": ["\U000f0001"]}, "a reserved character"),
    ({"question": "a", "answer": "\U000f0000<|end|>\U000f0001"}, "field 'answer' holds the reserved character U+F0000"),
    ({"question": "a", "answer": float("nan")}, "field 'answer' is number where text is needed"),
    ({"instruction": "a", "input": 3, "output": "b"}, "field 'input' is number where text is needed"),
    ({**MEDMCQA, "exp": None}, "field 'exp' is null where text is needed"),
    ({**MEDMCQA, "cop": 4}, "field 'cop' is 4 where 0, 1, 2 or 3 is needed (0 is A)"),
    ({**MEDMCQA, "cop": True}, "field 'cop' is True where"),
    ({**MEDMCQA, "cop": float("nan")}, "field 'cop' is nan where"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_says_why(row: dict[str, Any], reason: str) -> None:
    found = read(row)
    assert isinstance(found, str)
    assert reason in found


def test_mixed_forms_are_bad_rows_and_each_file_has_its_own_form(jsonl: Writer) -> None:
    rows = [
        {"question": "a", "answer": "b"},
        {"messages": [USER, ASSISTANT]},
        {"question": "c", "answer": "d"},
    ]
    one, two = jsonl(*rows, name="one.jsonl"), jsonl({"messages": [USER, ASSISTANT]}, name="two.jsonl")
    found = list(read_records([one, two], FieldsConfig()))
    assert [type(record) for record in found] == [Record, BadRow, Record, Record]
    assert str(found[1]) == (
        f"{one}:2: no field 'question', its fields are messages, but the file begins with question/answer rows"
    )


def test_rows_of_no_form_say_which_setting_helps(jsonl: Writer) -> None:
    [bad] = read_records([jsonl({"frage": "a", "antwort": "b"})], FieldsConfig())
    assert isinstance(bad, BadRow)
    assert bad.reason == (
        "its fields are antwort, frage, which is no known form: set data.fields.prompt and data.fields.response"
    )
