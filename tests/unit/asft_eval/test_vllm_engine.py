"""What becomes of an evaluation when vLLM's engine ends amid it, and of the engine when the evaluation is ended.

vLLM is not here: its client is played, its engine is a process that can be killed. `make test-vllm` does the same to a real one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import select
import signal
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from asft_eval import EvaluationError
from asft_eval.backends import vllm
from asft_eval.backends.vllm import VllmBackend
from asft_eval.types import Completion, Protocol

from asft_nemo import cli

pytestmark = [pytest.mark.usefixtures("keep_logging_and_warnings"), pytest.mark.timeout(240)]

FORK = multiprocessing.get_context("fork")
ENDED = "vLLM's engine ended before everything was answered"
GREEDY = Protocol(max_tokens=4)


class EngineDeadError(Exception):
    """vLLM's own for an engine that says it has failed."""


class Client:
    """vLLM's engine as its client sees it: `ends` is how the answers end, in their order; behind them nothing comes."""

    ends: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(max_model_len=100)
        self.engine_core = self
        self.outputs_queue: queue.Queue[Any] = queue.Queue()
        self.process = FORK.Process(target=time.sleep, args=(50,))
        self.process.start()
        self._asked: dict[str, list[int]] = {}
        self._ends = iter(("length", *self.ends))  # the first is asked when the backend is opened

    def add_request(self, request_id: str, prompt: dict[str, list[int]], _: Any) -> None:
        self._asked[request_id] = prompt["prompt_token_ids"]

    def has_unfinished_requests(self) -> bool:
        return bool(self._asked)

    def abort_request(self, ids: list[str]) -> None:
        raise AssertionError("nothing can be said to an engine that has ended")

    def step(self) -> list[Any]:
        end = next(self._ends, None)
        if end is None:
            raise self.outputs_queue.get(timeout=20)
        if end == "dead":
            raise EngineDeadError
        name, ids = next(iter(self._asked.items()))
        del self._asked[name]
        scores = [{token: SimpleNamespace(logprob=-1.0)} for token in ids]
        text = SimpleNamespace(finish_reason=end, token_ids=[5, 6])
        return [
            SimpleNamespace(
                finished=True,
                request_id=name,
                outputs=[text],
                prompt_token_ids=ids,
                prompt_logprobs=scores,
            )
        ]

    def shutdown(self) -> None:
        self.process.terminate()


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        name: ModuleType(name) for name in ("vllm", "vllm.v1.engine.exceptions", "vllm.sampling_params")
    }
    anything: dict[str, Any] = {
        "__spec__": ModuleSpec("vllm", None),
        "__version__": "1",
        "LLM": lambda **_: SimpleNamespace(llm_engine=Client()),
        "SamplingParams": SimpleNamespace,
    }
    modules["vllm"].__dict__.update(anything)
    modules["vllm.v1.engine.exceptions"].__dict__["EngineDeadError"] = EngineDeadError
    modules["vllm.sampling_params"].__dict__["RequestOutputKind"] = SimpleNamespace(FINAL_ONLY=2)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm, "_QUIET", {})


@pytest.fixture
def backend(model_dir: Path) -> Any:
    opened = VllmBackend(model_dir)
    yield opened
    opened.close()


def test_an_engine_that_is_killed_is_not_waited_for(backend: Any) -> None:
    """It says nothing any more, and vLLM's client would wait for it for ever."""
    threading.Timer(0.2, backend._engine.process.kill).start()
    with pytest.raises(EvaluationError, match=ENDED):
        backend.generate(["copy A:"], protocol=GREEDY)


def test_an_answer_that_an_ending_engine_gave_up_is_none(backend: Any) -> None:
    backend._engine._ends = iter(("stop", "length", "abort"))
    kept: list[tuple[int, Completion]] = []
    with pytest.raises(EvaluationError, match=ENDED):
        backend.generate(["A:", "B:", "C:"], protocol=GREEDY, done=lambda *one: kept.append(one))
    assert [place for place, _ in kept] == [0, 1]


def test_what_was_answered_is_kept_and_one_sentence_said(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Client, "ends", ("length", "dead"))
    file = tmp_path / "words.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"copy {x}:", "answer": x}) + "\n" for x in "AB"))
    words = [
        "eval",
        str(model_dir),
        "--backend",
        "vllm",
        "--suite",
        str(file),
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert ENDED in said.splitlines()[-1]
    assert "Traceback" not in said
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 1


def test_sigterm_ends_the_engine_too(model_dir: Path) -> None:
    reading, writing = os.pipe()  # its other end is open for as long as either process lives
    told: Any = FORK.Event()

    def evaluates() -> None:
        opened = VllmBackend(model_dir)
        told.set()
        opened.generate(["copy A:"], protocol=GREEDY)

    process = FORK.Process(target=evaluates)
    process.start()
    os.close(writing)
    assert told.wait(120)
    process.terminate()
    process.join(20)
    assert process.exitcode == -signal.SIGTERM
    assert select.select([reading], [], [], 20)[0], "the engine goes on"
    os.close(reading)


@pytest.mark.parametrize("fails", [False, True])
def test_what_sigterm_does_is_as_before_afterwards(
    fails: bool, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    if fails:

        def cannot(**_: Any) -> None:
            raise ValueError("no model")

        monkeypatch.setattr(sys.modules["vllm"], "LLM", cannot)
        with pytest.raises(EvaluationError, match="vLLM cannot load"):
            VllmBackend(model_dir)
    else:
        opened = VllmBackend(model_dir)
        assert signal.getsignal(signal.SIGTERM) is not before
        opened.close()
    assert signal.getsignal(signal.SIGTERM) is before
