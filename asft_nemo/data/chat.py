"""A tokenizer's own chat template: a conversation as one text, and which turns of it are learned.

The template renders the whole conversation, and the learned spans are found on that text:

* Where the template marks them with `{% generation %}`, the marks are taken.
* Otherwise an assistant's turn is what the template adds to its own generation prompt: rendered up to the turn, generation prompt included,
  the conversation must be the beginning of the conversation with the turn, and that the beginning of the whole. A row for which this does not hold (Qwen3's template, for example,
  takes the thoughts out of earlier turns) is a bad row with its reason; nothing is guessed.

The end: a turn is learned up to and with the last control token in it (`<|im_end|>`, `<|eot_id|>`, `</s>`); blanks that a template writes behind that are not
learned, for at inference nobody waits for them. Where the last turn ends with a control token, nothing is appended: that is the end the model learns, once. Where it does not,
blanks at the end are cut and the tokenizer's end token is appended and learned, once.

Control tokens: those that the template writes are put in guards, those in the text of a record are hidden from it and stay text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from asft_nemo.data.marking import control_pattern, guarded
from asft_nemo.data.records import Conversation, Message
from asft_nemo.data.templates import Rendered
from asft_nemo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_FIRST_HIDDEN = 0xF0010  # private characters that stand for the first characters of control tokens' names
_GENERATION = re.compile(r"\{%-?\+?\s*generation\b")


class _BadTurn(Exception):
    """The row cannot be rendered; the message is the reason."""


@dataclass(frozen=True)
class _Turn:
    """A learned turn: its place in the text, and whether a control token ends it."""

    span: Span
    ended: bool


@dataclass(frozen=True)
class _NoClock:
    """Stands for transformers' `strftime_now`, whose date no fingerprint and no cache could know."""

    folder: str

    def __call__(self, *_: Any, **__: Any) -> str:
        raise DataError(
            f"the chat template of the tokenizer in {self.folder} writes the present date (strftime_now), so that the same rows have other tokens "
            "on another day: write a fixed date into the template in its place, or take it out and give the date in the rows' system messages"
        )


class ChatTemplate:
    """Renders conversations as the tokenizer's chat template says.

    Args:
        tokenizer: of the model.
        control: names of its control tokens.

    Raises:
        DataError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Sequence[str]):
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer in {tokenizer.name_or_path} has no chat template: add its chat_template.jinja, or set "
                "data.template=alpaca or raw"
            )
        self._source = tokenizer.get_chat_template()
        # A name given here goes before transformers' own of the same name.
        self._values: dict[str, Any] = {
            **tokenizer.special_tokens_map,
            "strftime_now": _NoClock(tokenizer.name_or_path),
        }
        self._marks_turns = _GENERATION.search(self._source) is not None
        self._control = control_pattern(control)
        firsts = sorted({name[0] for name in control})
        self._hidden = {first: chr(_FIRST_HIDDEN + i) for i, first in enumerate(firsts)}
        self._shown = {ord(hidden): first for first, hidden in self._hidden.items()}

    def render(self, conversation: Conversation, loss_on: str) -> Rendered | str:
        """The conversation as one text, or why there is none.

        Args:
            conversation: ends with an assistant's message.
            loss_on: `all_assistant` learns every assistant's turn whose `weight` is not 0, anything else the last one.

        Raises:
            DataError: the template writes the present date.
        """
        messages = [self._hide(message) for message in conversation.messages]
        tools = [self._hide(tool) for tool in conversation.tools] or None
        speakers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        chosen = speakers if loss_on == "all_assistant" else speakers[-1:]
        chosen = [i for i in chosen if conversation.messages[i].get("weight", 1) != 0]
        if not chosen:
            return "no message is learned: the weight of each is 0"
        try:
            text, turns = self._turns(messages, tools, speakers, chosen)
        except _BadTurn as reason:
            return str(reason)
        end = False
        if not turns[-1].ended and chosen[-1] == speakers[-1]:
            text, end = text[: turns[-1].span[1]].rstrip(), True
        return self._guard(text, [turn.span for turn in turns], end)

    def _turns(
        self, messages: list[Message], tools: Any, speakers: list[int], chosen: list[int]
    ) -> tuple[str, list[_Turn]]:
        whole, marks = self._render(messages, tools)
        if not self._marks_turns:
            return whole, [self._turn(messages, tools, i, whole) for i in chosen]
        if len(marks) != len(speakers):
            raise _BadTurn(
                f"the chat template marks {len(marks)} generations in a conversation with {len(speakers)} turns of the "
                "assistant: correct the template"
            )
        turns: list[_Turn] = []
        for i in chosen:
            start, stop = marks[speakers.index(i)]
            ends = {found.end() for found in self._controls(whole)}
            behind = {found.start(): found.end() for found in self._controls(whole)}
            stop = stop if stop in ends else behind.get(stop, stop)
            turns.append(self._until_end(whole, start, stop))
        return whole, turns

    def _turn(self, messages: list[Message], tools: Any, place: int, whole: str) -> _Turn:
        """An assistant's turn, found as what the template adds to its generation prompt."""
        before, _ = self._render(messages[:place], tools, generation_prompt=True)
        until = whole if place == len(messages) - 1 else self._render(messages[: place + 1], tools)[0]
        if not until.startswith(before):
            raise _BadTurn(
                f"the chat template does not begin message {place + 1} with its own generation prompt, so it cannot be told what the "
                "model writes: mark it with {% generation %} in the template, or set another data.template"
            )
        turn = self._until_end(until, len(before), len(until))
        if not whole.startswith(until[: turn.span[1]]):
            raise _BadTurn(
                f"the chat template rewrites message {place + 1} when more follow, so what would be learned is not what the model "
                "writes there: set data.loss_on=last_assistant"
            )
        return turn

    def _until_end(self, text: str, start: int, stop: int) -> _Turn:
        """The turn up to its last control token, where only blanks stand behind that."""
        last = max(
            (found.end() for found in self._controls(text) if start <= found.start() < stop), default=None
        )
        if last is not None and not text[last:stop].strip():
            return _Turn((start, last), ended=True)
        return _Turn((start, stop), ended=False)

    def _render(
        self, messages: list[Message], tools: Any, *, generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        # Templates are anyone's code, run in Jinja's sandbox: what they cannot take is the row's fault.
        try:
            found: Any = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._source,
                return_assistant_tokens_mask=self._marks_turns,
                add_generation_prompt=generation_prompt,
                **self._values,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise _BadTurn(f"the chat template refuses it: {reason.translate(self._shown)}") from error
        texts, marks = found
        return texts[0], list(marks[0]) if self._marks_turns else []

    def _controls(self, text: str) -> list[re.Match[str]]:
        return [] if self._control is None else list(self._control.finditer(text))

    def _hide(self, value: Any) -> Any:
        """The value with every control token's name inside its texts broken by a private first character."""
        if isinstance(value, str):
            while self._control is not None and self._control.search(
                value
            ):  # again: one name may hold another
                value = self._control.sub(lambda found: self._hidden[found[0][0]] + found[0][1:], value)
            return value
        if isinstance(value, Mapping):
            return {key: self._hide(inside) for key, inside in value.items()}
        return [self._hide(inside) for inside in value] if isinstance(value, (list, tuple)) else value

    def _guard(self, text: str, spans: Sequence[Span], end: bool) -> Rendered:
        """The text with the template's control tokens in guards, the hidden names shown, and the spans moved along."""
        ends = [found.end() for found in self._controls(text)]

        def moved(place: int) -> int:
            return place + 2 * sum(stop <= place for stop in ends)

        if self._control is not None:
            text = self._control.sub(lambda found: guarded(found[0]), text)
        learned = tuple((moved(start), min(moved(stop), len(text))) for start, stop in spans)
        return Rendered(text.translate(self._shown), learned, begin=False, end=end)
