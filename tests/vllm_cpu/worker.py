"""Asks the backend `vllm` within the environment that has vLLM.

python worker.py MODEL_DIR OUT.json SUITE RESULT_DIR    runs `asft eval` on a suite, then asks the backend that it opened
python worker.py MODEL_DIR OUT.json                     a model divided over two processes
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from asft_eval.backends import Options, opened
from asft_eval.backends import vllm as module
from asft_eval.backends.tokens import completion
from asft_eval.backends.vllm import VllmBackend
from asft_eval.errors import EvaluationError
from asft_eval.types import Completion, Protocol
from vllm_questions import CHOICES, EVALUATION, MAX_TOKENS, PROMPTS, TEXTS

from asft_nemo import cli

GREEDY = Protocol(max_tokens=MAX_TOKENS)


def evaluated(model_dir: str, suite: str, result_dir: str) -> tuple[VllmBackend, str, int]:
    """The backend that `asft eval` opened, what the command printed, and how often it closed the backend."""
    begun: list[VllmBackend] = []
    closed: list[VllmBackend] = []

    class Kept(VllmBackend):
        """Loading takes half a minute: what is opened once serves the whole process."""

        def __init__(self, *arguments: Any, **settings: Any):
            super().__init__(*arguments, **settings)
            begun.append(self)

        def close(self) -> None:
            closed.append(self)

    module.VllmBackend = Kept
    words = [
        "eval",
        model_dir,
        "--suite",
        suite,
        "--backend",
        "vllm",
        *EVALUATION,
        "--json",
        "--out",
        result_dir,
    ]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = cli.main(words)
    assert code == 0, f"asft eval ended with {code}"
    (backend,) = begun
    return backend, printed.getvalue(), closed.count(backend)


def ask(model_dir: str, suite: str, result_dir: str) -> dict[str, Any]:
    """Everything that one engine is asked."""
    backend, printed, closed = evaluated(model_dir, suite, result_dir)
    ids: list[list[int]] = []
    told: dict[int, list[int]] = {}

    def seen(tokenizer: Any, written: Sequence[int]) -> Completion:
        ids.append(list(written))
        return completion(tokenizer, written)

    module.completion = seen  # a completion's tokens are no part of a backend's answer
    completions = backend.generate(PROMPTS, protocol=GREEDY, done=lambda i, _: told.update({i: ids[-1]}))
    drawn = Protocol(name="paper", max_tokens=MAX_TOKENS, temperature=1.0, seed=0)
    seeds = list(range(len(PROMPTS)))
    together = backend.generate(PROMPTS, protocol=drawn, seeds=seeds)
    alone = [backend.generate([x], protocol=drawn, seeds=[i])[0] for i, x in list(enumerate(PROMPTS))[:4]]
    several = backend.generate(["story: the"] * 20, protocol=drawn, seeds=range(20))
    found = {
        "printed": printed,
        "closed": closed,
        "completions": [asdict(x) for x in completions],
        "tokens": [told[i] for i in range(len(PROMPTS))],
        "together": [x.text for x in together[:4]],
        "alone": [x.text for x in alone],
        "several": [x.text for x in several],
        "choices": backend.choice_logprobs(PROMPTS, CHOICES),
        "texts": [asdict(x) for x in backend.loglikelihood(TEXTS)],
        "too_long": refusal(backend, "a b c " * 2000),
        "after": [x.text for x in backend.generate(PROMPTS[:2], protocol=GREEDY)],
        "versions": dict(backend.versions),
        "killed": killed(backend),
    }
    VllmBackend.close(backend)
    return found


def ask_divided(model_dir: str) -> dict[str, Any]:
    """A little of the same, of an engine whose layers are divided over two processes."""
    with opened("vllm", model_dir, Options(tensor_parallel_size=2)) as backend:
        found = {
            "completions": [x.text for x in backend.generate(PROMPTS, protocol=GREEDY)],
            "choices": backend.choice_logprobs(PROMPTS, CHOICES),
            "processes": at_work(),
        }
    return {**found, "left": at_work()}


def at_work() -> list[str]:
    """Processes of vLLM's engine, and threads here that watch them."""
    begun = (child.name() for child in psutil.Process().children(recursive=True))
    watching = (thread.name for thread in threading.enumerate())
    return [name for name in (*begun, *watching) if name.startswith(("VLLM", "MPClient", "EngineCore"))]


def killed(backend: VllmBackend) -> str:
    """What is said of an engine that is killed before it has answered, as the system does where memory runs out."""
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGSTOP)
        threading.Timer(1.0, child.kill).start()
    return refusal(backend, PROMPTS[0])


def refusal(backend: VllmBackend, prompt: str) -> str:
    try:
        backend.generate([prompt], protocol=Protocol(max_tokens=1))
    except EvaluationError as error:
        return str(error)
    return ""


def main(model_dir: str, out: str, *evaluation: str) -> None:
    answers = ask(model_dir, *evaluation) if evaluation else ask_divided(model_dir)
    Path(out).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":  # vLLM's processes import this file
    main(*sys.argv[1:])
