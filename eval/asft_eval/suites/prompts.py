"""Prompt variants by name: what stands around a question. A variant more = one row.

A model answers best in the words it was trained on, so scores of different variants are not comparable; the variant is
part of a suite's hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from asft_eval.errors import EvaluationError, did_you_mean, one_line


class NoChatTemplate(EvaluationError):
    """A tokenizer has none, as those of base models do."""


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{question}\n\n### Response:"
)
_QWEN_BOXED = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
)

CHAT = "chat"
"""The model's own chat template with the question as the user's only turn; it is only known with the model."""

PROMPTS: Mapping[str, str] = MappingProxyType(
    {
        "raw": "{question}",
        # byte for byte the text of the training runs: the response follows "Response:" at once
        "alpaca": _ALPACA,
        # what the ASFT authors' mathematics evaluation asks, unlike their training
        "alpaca_newline": _ALPACA + "\n",
        # the prompt "qwen25-math-cot" of the Qwen2.5-Math harness
        "qwen_boxed": _QWEN_BOXED,
        # the prompt "cot" of that harness
        "question_answer": "Question: {question}\nAnswer:",
        CHAT: "{question}",
    }
)


def render(variant: str, question: str) -> str:
    """A question as a prompt; of `chat` the question alone, to be put into the model's template by `as_chat`.

    Raises:
        EvaluationError: no variant has this name.
    """
    if variant not in PROMPTS:
        raise EvaluationError(
            f"there is no prompt variant {variant!r}: {did_you_mean(variant, sorted(PROMPTS))}"
        )
    # Not str.format: braces in a question are its own.
    return PROMPTS[variant].replace("{question}", question)


def as_chat(model_dir: Path | str, questions: list[str]) -> list[str]:
    """Every question as the user's turn in the chat template of a model directory, ready for the assistant's.

    A begin token that the tokenizer adds to every text by itself is left out, so that the model sees it once.

    Raises:
        EvaluationError: the directory's tokenizer cannot be loaded, or its chat template does not take a user's question.
        NoChatTemplate: there is none.
    """
    from transformers import AutoTokenizer

    try:
        opener: Any = AutoTokenizer
        tokenizer: Any = opener.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # tokenizers has no error of its own for a damaged file
        raise EvaluationError(
            f"transformers cannot load the tokenizer in {model_dir} ({one_line(error)}): copy the base model's tokenizer files into it"
        ) from error
    if not tokenizer.chat_template:
        raise NoChatTemplate(
            f"the tokenizer in {model_dir} has no chat template: choose another prompt variant, e.g. alpaca"
        )
    adds_begin = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]
    begin: str = tokenizer.bos_token if adds_begin else ""
    try:
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            ).removeprefix(begin)
            for question in questions
        ]
    except Exception as error:  # a template is a program: it raises what it likes
        raise EvaluationError(
            f"the chat template in {model_dir} does not take a user's question ({type(error).__name__}: {one_line(error)}): correct it, or choose another "
            "prompt variant, e.g. alpaca"
        ) from error


__all__ = ["CHAT", "PROMPTS", "NoChatTemplate", "as_chat", "render"]
