"""A model behind a server that speaks OpenAI's protocol, e.g. `vllm serve`: completions or chat."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asft_eval.backends import Done, LogLikelihood, ignore
from asft_eval.backends.server import Server
from asft_eval.backends.tokens import (
    choice_tokens,
    encode_pair,
    end_tokens,
    load_tokenizer,
    prompt_tokens,
    require_seeds,
)
from asft_eval.errors import EvaluationError
from asft_eval.types import Completion, Protocol

COMPLETIONS, CHAT = "completions", "chat"

# What vLLM would otherwise take from the model's generation_config.json, e.g. a repetition penalty of 1.05. Not of OpenAI's protocol.
_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}

_Text = str | list[int]


class OpenAIBackend:
    """A model of a server.

    With the interface `completions` prompts are completed as they are; with `chat` each is the user's turn, and the server puts it into
    the model's template. Where `model` is also a model directory here, its tokenizer makes the tokens that are sent.

    Args:
        model: as the server knows it; `vllm serve DIR` knows it as DIR.
        base_url: see `Server`.
        api: `completions` or `chat`; None = `completions`.
        batch_size: requests under way.
        first_wait: see `Server`.

    Raises:
        EvaluationError: no server answers, or it has no such model.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api: str | None = None,
        batch_size: int,
        first_wait: float = 1.0,
    ):
        import httpx

        api = api or COMPLETIONS
        if api not in (COMPLETIONS, CHAT):
            raise EvaluationError(f"api is {api!r}: choose {COMPLETIONS} or {CHAT}")
        self._server = Server(base_url, at_once=batch_size, first_wait=first_wait)
        self.applies_chat_template = api == CHAT
        self.name = "openai" if api == COMPLETIONS else "openai-chat"
        self.versions: Mapping[str, str] = {"httpx": httpx.__version__}
        self._model, is_vllm = self._find(model)
        self._always: dict[str, Any] = {"model": self._model, **(_NEUTRAL if is_vllm else {})}
        here = (Path(model) / "config.json").is_file()
        self.fingerprint = (
            None if here else hashlib.sha256(f"{self._server.url} {self._model}".encode()).hexdigest()
        )
        known = here and (api == COMPLETIONS or any(Path(model).glob("tokenizer*")))
        tokenizer: Any = load_tokenizer(model) if known else None
        self._tokenizer = tokenizer if api == COMPLETIONS else None
        if is_vllm and tokenizer is not None:  # not of OpenAI's protocol either
            self._always["stop_token_ids"] = list(end_tokens(tokenizer))

    def _find(self, model: str) -> tuple[str, bool]:
        """The server's name of the model, and whether the server is vLLM."""
        with self._as_the_protocol_says():
            listed = self._server.get("models", tries=3)["data"]
            owners = {str(row["id"]): row.get("owned_by") for row in listed}
        wanted = Path(model).resolve()
        for name, owner in owners.items():
            if name == model or (wanted.is_dir() and Path(name).resolve() == wanted):
                return name, owner == "vllm"
        known = ", ".join(sorted(owners)[:20]) or "no model"
        raise EvaluationError(f"the server {self._server.url} has no model {model}: it has {known}")

    def generate(
        self,
        prompts: Sequence[str],
        *,
        protocol: Protocol,
        seeds: Sequence[int] = (),
        done: Done[Completion] = ignore,
    ) -> list[Completion]:
        """Completions, greedy or drawn; a request each, with its own seed. Text is as the server decodes it.

        Raises:
            EvaluationError: the server refuses or fails, or there is not one seed a prompt.
        """
        require_seeds(prompts, protocol, seeds)
        drawn = protocol.temperature > 0
        how = {
            "temperature": protocol.temperature,
            "top_p": protocol.top_p,
            "max_tokens": protocol.max_tokens,
            "n": 1,
        }

        def one(place: int) -> Completion:
            return self._complete(prompts[place], {**how, **({"seed": seeds[place]} if drawn else {})})

        return self._server.each(one, len(prompts), done)

    def _complete(self, prompt: str, how: Mapping[str, Any]) -> Completion:
        if self.applies_chat_template:
            body = {"messages": [{"role": "user", "content": prompt}]}
            answer = self._server.post("chat/completions", {**self._always, **how, **body})
        else:
            asked: _Text = prompt_tokens(self._tokenizer, prompt) if self._tokenizer else prompt
            answer = self._server.post("completions", {**self._always, **how, "prompt": asked})
        with self._as_the_protocol_says():
            choice = _only(answer["choices"])
            # A chat model that spent all its tokens on thinking has said nothing, which is null.
            text = (choice["message"]["content"] or "") if self.applies_chat_template else choice["text"]
            usage: dict[str, Any] = answer.get("usage") or {}
            written = int(usage.get("completion_tokens") or 0)
            # Halves of a character, which JSON allows, cannot be written to a file.
            whole = text.encode("utf-8", "replace").decode()
            return Completion(whole, written, choice.get("finish_reason") != "length")

    def choice_logprobs(
        self, prompts: Sequence[str], choices: Sequence[str], *, done: Done[list[float]] = ignore
    ) -> list[list[float]]:
        """For every prompt the log probability of each choice as its continuation (sum over the choice's tokens).

        Raises:
            EvaluationError: see `require_logprobs`; or, without the model's tokenizer here, prompt and choice share a token.
        """

        def one(place: int) -> list[float]:
            prompt = prompts[place]
            if self._tokenizer is None:
                return [self._of_text(prompt, choice).logprob for choice in choices]
            start = prompt_tokens(self._tokenizer, prompt)
            tails = [choice_tokens(self._tokenizer, start, prompt, choice) for choice in choices]
            return [self._of_tokens(start + tail, len(start)).logprob for tail in tails]

        return self._server.each(one, len(prompts), done)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """Log probability of each continuation after its prompt; the end token is not scored. Errors: see `choice_logprobs`."""

        def one(place: int) -> LogLikelihood:
            if self._tokenizer is None:
                return self._of_text(*pairs[place])
            ids, start = encode_pair(self._tokenizer, *pairs[place], end=False)
            return self._of_tokens(ids, start)

        return self._server.each(one, len(pairs), ignore)

    def require_logprobs(self) -> None:
        """Asks for log probabilities of a short text.

        Raises:
            EvaluationError: the server gives none.
        """
        if self.applies_chat_template:
            raise EvaluationError(
                "the chat interface gives no log probabilities of a given text, which suites of multiple choice need: "
                f"choose api {COMPLETIONS}, or leave those suites out"
            )
        self._echo("one two three")

    def _of_tokens(self, ids: list[int], start: int) -> LogLikelihood:
        _, logprobs = self._echo(ids)
        return LogLikelihood(sum(logprobs[start:]), len(ids) - start)

    def _of_text(self, prompt: str, continuation: str) -> LogLikelihood:
        before, _ = self._echo(prompt)
        whole, logprobs = self._echo(prompt + continuation)
        if whole[: len(before)] != before or len(whole) == len(before):
            raise EvaluationError(
                f"the model's tokens join the end of a prompt with {continuation[:20]!r}: name the model's directory instead of {self._model}, so that "
                "its tokenizer can part them"
            )
        return LogLikelihood(sum(logprobs[len(before) :]), len(whole) - len(before))

    def _echo(self, text: _Text) -> tuple[list[str], list[float]]:
        """The tokens of a text and the log probability of each after those before it (of the first: 0)."""
        # One token is written after the text, because many servers cannot write none.
        how = {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0.0}
        answer = self._server.post("completions", {**self._always, **how})
        with self._as_the_protocol_says():
            choice = _only(answer["choices"])
            found: dict[str, list[Any]] = choice.get("logprobs") or {}
            count = int(answer["usage"]["prompt_tokens"])
            tokens, logprobs = found.get("tokens") or [], found.get("token_logprobs") or []
            if min(len(tokens), len(logprobs)) <= count or None in logprobs[1:count]:
                raise EvaluationError(
                    f"the server {self._server.url} gives no log probabilities of a given text (echo and logprobs), which suites of multiple choice "
                    "need: leave those suites out, or serve the model with vllm serve"
                )
            values = [float(x or 0.0) for x in logprobs[:count]]
            if any(map(math.isnan, values)):
                raise ValueError("a log probability is no number")
            return tokens[:count], values

    @contextmanager
    def _as_the_protocol_says(self) -> Generator[None, None, None]:
        """An answer that is read within and lacks something, or has it in another form, is one sentence."""
        try:
            yield
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise EvaluationError(
                f"the server {self._server.url} answers otherwise than OpenAI's protocol says ({type(error).__name__}: {self._server.line(error)}): correct "
                "--base-url, or use another server; answers so far are kept"
            ) from error


def _only(choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One is asked for."""
    if len(choices) != 1:
        raise ValueError(f"{len(choices)} choices instead of 1")
    return choices[0]
