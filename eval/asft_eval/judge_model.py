"""A language model as judge: it sees an instruction and two answers, and says which is better.

Which of the two comes first is drawn from the instruction alone, so it is the same for every model that is judged, and a judge that
likes the first one favours none. A model here says it by the probabilities of "1" and "2" as the next token; a server's model by what it writes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asft_eval.backends import Options, close, open_backend
from asft_eval.backends.tokens import require_numbers
from asft_eval.judge import Duel, Judgement, Verdict
from asft_eval.requests import Journal
from asft_eval.result import fingerprint
from asft_eval.suites.prompts import NoChatTemplate, as_chat
from asft_eval.types import Completion, Protocol

_VERSION = "1"  # changes with the words below
_WORDS = """Two assistants were given the same instruction. Compare their answers as the person who asked would: is what was asked done, is it correct, \
is it clear, is nothing missing and nothing superfluous? A longer answer is not better for being longer.

[Instruction]
{instruction}

[Answer 1]
{first}

[Answer 2]
{second}

Which answer is better? Reply with 1 or 2 and nothing else."""
_HOW = Protocol(name="judge", max_tokens=16)
_NO_LENGTH_CONTROL = (
    "the length-controlled win rate is not computed: the alpaca_eval package does it (--judge alpaca_eval)"
)


class ModelJudge:
    """A model of any backend.

    Args:
        model: a Hugging Face model directory, or a name that the server knows.
        backend: a name of `asft_eval.backends.BACKENDS`; of `openai` the chat interface is used.
        options: how the backend is opened.
    """

    def __init__(self, model: str, *, backend: str, options: Options):
        self.name = model
        self._engine = open_backend(backend, model, options)
        self._writes = bool(getattr(self._engine, "applies_chat_template", False))
        try:
            self._fingerprint: str = getattr(self._engine, "fingerprint", None) or fingerprint(Path(model))
        except BaseException:  # a large model is read for a minute
            self.close()
            raise

    @property
    def identity(self) -> str:
        """Hash of model, interface and words."""
        parts = [self._fingerprint, self._writes, _VERSION, _WORDS]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def close(self) -> None:
        """End what the model's backend started."""
        close(self._engine)

    def decide(self, duels: Sequence[Duel], *, outputs: Path) -> Judgement:
        """The verdicts; answers are written down as they come, and none is asked for twice."""
        prompts, choices = self._prompts([_prompt(duel) for duel in duels])
        keys = [hashlib.sha256(f"{self.identity} {prompt}".encode()).hexdigest()[:20] for prompt in prompts]
        journal = Journal(outputs.with_suffix(".judge.jsonl"), keys)
        missing = [place for place, key in enumerate(keys) if key not in journal.rows]

        def keep(place: int, said: str) -> None:
            at = missing[place]
            journal.add([{"request": keys[at], "id": duels[at].id, "completion": said}])

        if missing:
            self._ask([prompts[at] for at in missing], choices, keep)
        said = [str(journal.rows[key]["completion"]) for key in keys]
        verdicts = [_verdict(duel, text) for duel, text in zip(duels, said, strict=True)]
        return Judgement(
            verdicts=verdicts,
            unreadable=sum(_chosen(text) is None for text in said),
            win_rate=sum(verdict.won for verdict in verdicts) / len(verdicts),
            length_controlled_win_rate=None,
            remark=_NO_LENGTH_CONTROL,
        )

    def _prompts(self, prompts: list[str]) -> tuple[list[str], tuple[str, str]]:
        """As the model takes them, and how its choice begins."""
        if self._writes:
            return prompts, ("1", "2")
        try:
            return as_chat(self.name, prompts), ("1", "2")
        except NoChatTemplate:  # a base model
            return [f"{prompt}\n\nBetter answer:" for prompt in prompts], (" 1", " 2")

    def _ask(self, prompts: list[str], choices: tuple[str, str], keep: Any) -> None:
        if self._writes:

            def written(place: int, answer: Completion) -> None:
                keep(place, answer.text)

            self._engine.generate(prompts, protocol=_HOW, done=written)
            return

        def weighed(place: int, logprobs: list[float]) -> None:
            require_numbers(logprobs, self.name)
            keep(place, choices[int(logprobs[1] > logprobs[0])].strip())

        self._engine.choice_logprobs(prompts, choices, done=weighed)


def _comes_first(duel: Duel) -> bool:
    """Whether the model's answer is shown first."""
    return hashlib.sha256(duel.instruction.encode()).digest()[0] % 2 == 0


def _prompt(duel: Duel) -> str:
    answers = (duel.output, duel.reference) if _comes_first(duel) else (duel.reference, duel.output)
    values = {"instruction": duel.instruction, "first": answers[0], "second": answers[1]}
    # In one pass: an answer may hold the names of the others.
    return re.sub(r"\{(instruction|first|second)\}", lambda match: values[match[1]], _WORDS)


def _chosen(said: str) -> int | None:
    """1 or 2, where exactly one of them is named."""
    named = set(re.findall(r"(?<!\d)[12](?!\d)", said))
    return int(named.pop()) if len(named) == 1 else None


def _verdict(duel: Duel, said: str) -> Verdict:
    chosen = _chosen(said)
    first = _comes_first(duel)
    if chosen is None:
        return Verdict(False, f"the judge named no answer: {said.strip()[:80]!r}")
    own = 1 if first else 2
    return Verdict(chosen == own, f"the judge chose answer {chosen}; the model's was answer {own}")
