"""Asks the backend `vllm` within the environment that has vLLM: `python worker.py MODEL_DIR OUT.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from asft_eval.backends import vllm as module
from asft_eval.backends.tokens import completion
from asft_eval.errors import EvaluationError
from asft_eval.types import Completion, Protocol
from vllm_questions import CHOICES, MAX_TOKENS, PROMPTS, TEXTS


def main(model_dir: str, out: str) -> None:
    backend = module.VllmBackend(model_dir)
    greedy = Protocol(max_tokens=MAX_TOKENS)
    ids: list[list[int]] = []
    told: dict[int, list[int]] = {}

    def seen(tokenizer: Any, written: Sequence[int]) -> Completion:
        ids.append(list(written))
        return completion(tokenizer, written)

    module.completion = seen  # a completion's tokens are no part of a backend's answer
    completions = backend.generate(PROMPTS, protocol=greedy, done=lambda i, _: told.update({i: ids[-1]}))
    drawn = Protocol(name="paper", max_tokens=MAX_TOKENS, temperature=1.0, seed=0)
    seeds = list(range(len(PROMPTS)))
    together = backend.generate(PROMPTS, protocol=drawn, seeds=seeds)
    alone = [backend.generate([x], protocol=drawn, seeds=[i])[0] for i, x in list(enumerate(PROMPTS))[:4]]
    several = backend.generate(["story: the"] * 20, protocol=drawn, seeds=range(20))
    answers: dict[str, Any] = {
        "completions": [asdict(x) for x in completions],
        "tokens": [told[i] for i in range(len(PROMPTS))],
        "together": [x.text for x in together[:4]],
        "alone": [x.text for x in alone],
        "several": [x.text for x in several],
        "choices": backend.choice_logprobs(PROMPTS, CHOICES),
        "texts": [asdict(x) for x in backend.loglikelihood(TEXTS)],
        "too_long": refusal(backend, "a b c " * 2000),
        "after": [x.text for x in backend.generate(PROMPTS[:2], protocol=greedy)],
        "versions": dict(backend.versions),
    }
    Path(out).write_text(json.dumps(answers), encoding="utf-8")


def refusal(backend: module.VllmBackend, prompt: str) -> str:
    try:
        backend.generate([prompt], protocol=Protocol(max_tokens=1))
    except EvaluationError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
