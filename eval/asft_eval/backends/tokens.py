"""From text to token ids and back: what every backend that has the model's tokenizer does alike."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from asft_eval.errors import EvaluationError, one_line
from asft_eval.types import Completion, Protocol

MEND = "name a complete Hugging Face model directory"
"""The cure of a damaged one."""


def require(model_dir: Path, pattern: str, what: str) -> None:
    """A file that a model directory must have.

    Raises:
        EvaluationError: no such directory, or nothing in it that the pattern matches.
    """
    if model_dir.is_file():
        raise EvaluationError(f"{model_dir} is a file: name the Hugging Face model directory that it is in")
    if not model_dir.is_dir():
        raise EvaluationError(f"there is no model directory {model_dir}: check the path")
    if not any(model_dir.glob(pattern)):
        raise EvaluationError(f"{model_dir} lacks {what}: {MEND}")


_INDEX = "model.safetensors.index.json"


def require_model(model_dir: Path) -> None:
    """A configuration and weights, of several files each that their index names (vLLM runs without a lost one); see `require`."""
    require(model_dir, "config.json", "a model configuration")
    require(model_dir, "*.safetensors", "weights (*.safetensors)")
    if not (model_dir / _INDEX).is_file():
        return
    try:
        named = set(json.loads((model_dir / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"{model_dir / _INDEX} is damaged ({one_line(error)}): {MEND}") from None
    for name in sorted(named):
        require(model_dir, name, f"{name}, which {_INDEX} names")


def require_tokenizer(model_dir: Path) -> None:
    """Files of a tokenizer; see `require`."""
    require(model_dir, "tokenizer*", "a tokenizer (copy the base model's tokenizer files into it)")


def require_seeds(prompts: Sequence[str], protocol: Protocol, seeds: Sequence[int]) -> None:
    """One seed a prompt where something is drawn.

    Raises:
        EvaluationError: there are more or fewer.
    """
    if protocol.temperature > 0 and len(seeds) != len(prompts):
        raise EvaluationError(
            f"{len(prompts)} completions are to be drawn with {len(seeds)} seeds: give one a prompt"
        )


def not_numbers(model: Path | str) -> EvaluationError:
    """What is said of a model that computes nothing: NaN compares with nothing, so its first token or choice would be taken for an answer."""
    return EvaluationError(
        f"{model} gives no answers, its logits are not numbers (NaN or infinite): its weights are damaged or too large for their dtype, give another "
        "checkpoint"
    )


def require_numbers(logprobs: Iterable[float], model: Path | str) -> None:
    """Log probabilities are numbers; minus infinity is one, of what can never come.

    Raises:
        EvaluationError: one is NaN or infinite.
    """
    if any(math.isnan(x) or x == math.inf for x in logprobs):
        raise not_numbers(model)


def require_room(lengths: Iterable[int], room: float) -> None:
    """Texts leave room for at least one token more: what is computed past a model's context is no measure of it.

    Args:
        lengths: tokens of each.
        room: tokens of the model's context.

    Raises:
        EvaluationError: one does not.
    """
    longest = max(lengths, default=0)
    if longest >= room:
        raise EvaluationError(
            f"a prompt has {longest} tokens and the model's context {room}, which leaves no room for an answer: leave the suite out"
        )


def load_tokenizer(model_dir: Path | str) -> Any:
    """The tokenizer of a model directory, with a padding token (the end token where it has none).

    Raises:
        EvaluationError: the directory holds no tokenizer, or one that names no end token, without which no completion ends.
    """
    from transformers import AutoTokenizer

    model_dir = Path(model_dir)
    require_tokenizer(model_dir)
    try:
        opener: Any = AutoTokenizer
        tokenizer = opener.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # tokenizers has no error of its own for a damaged file
        raise EvaluationError(
            f"transformers cannot load the tokenizer in {model_dir} ({one_line(error)}): copy the base model's tokenizer files into it"
        ) from error
    if tokenizer.eos_token_id is None:
        raise EvaluationError(
            f"the tokenizer in {model_dir} names no end token: write the base model's eos_token into its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_pair(tokenizer: Any, prompt: str, continuation: str, *, end: bool) -> tuple[list[int], int]:
    """Token ids of prompt and continuation, encoded apart and joined, and the number of the prompt's.

    Args:
        tokenizer: adds its special tokens to the prompt only.
        prompt: never scored.
        continuation: scored text.
        end: whether the end token follows the continuation.
    """
    prompt_ids: list[int] = tokenizer(prompt)["input_ids"]
    continuation_ids: list[int] = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    if not prompt_ids:  # the first token has no distribution of its own: it needs something before it
        prompt_ids = [
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ]
    return prompt_ids + continuation_ids + ([tokenizer.eos_token_id] if end else []), len(prompt_ids)


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt, at least one."""
    return encode_pair(tokenizer, prompt, "", end=False)[0]


def choice_tokens(tokenizer: Any, start: list[int], prompt: str, choice: str) -> list[int]:
    """A choice's tokens: what the whole text has more than the prompt; encoded apart where the two merge.

    Args:
        tokenizer: of the model.
        start: the prompt's own tokens.
        prompt: the text before the choice.
        choice: its continuation.
    """
    whole: list[int] = tokenizer(prompt + choice)["input_ids"]
    if whole[: len(start)] == start and len(whole) > len(start):
        return whole[len(start) :]
    return tokenizer(choice, add_special_tokens=False)["input_ids"]


_SAID = "answer"
"""By the assistant, in the conversation that is asked of a chat template."""


@lru_cache(maxsize=8)
def end_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a completion: the tokenizer's end token, and the control token with which its chat template ends an assistant's message.

    A model that learned from such a template ends its answers with the latter (`<|im_end|>`, where the base's end token is `<|endoftext|>`), and what it writes behind
    that is another turn. The harness of Qwen2.5-Math, which the authors used, stops at both as well.
    """
    ends: list[int] = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _SAID}]
        try:
            text: str = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # a template is a program, and may refuse this conversation
            text = ""
        behind: list[int] = tokenizer(text.rpartition(_SAID)[2].lstrip(), add_special_tokens=False)[
            "input_ids"
        ]
        control = tokenizer.added_tokens_decoder
        if _SAID in text and behind and behind[0] in control and control[behind[0]].special:
            ends.append(behind[0])
    return tuple(dict.fromkeys(ends))


def completion(tokenizer: Any, ids: Sequence[int]) -> Completion:
    """What generated tokens say up to the first of `end_tokens`; `finished` where one is among them."""
    ends = end_tokens(tokenizer)
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
    return Completion(text, len(ids) if end is None else end + 1, end is not None)
