"""vLLM in this process: batched as its scheduler sees fit, prompts that begin alike computed once, layers divided over GPUs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from asft_eval.backends import Done, LogLikelihood, ignore
from asft_eval.backends.placement import share_heads
from asft_eval.backends.tokens import (
    MEND,
    choice_tokens,
    completion,
    encode_pair,
    end_tokens,
    load_tokenizer,
    prompt_tokens,
    require_model,
    require_numbers,
    require_room,
    require_seeds,
)
from asft_eval.errors import EvaluationError, one_line
from asft_eval.types import Completion, Protocol

log = logging.getLogger(__name__)

# vLLM reports its use to its makers and logs to stdout, which belongs to our results.
_QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}

_END_SECONDS = 10
"""That what was asked to end is waited for."""

_WHOLE = ("stop", "length")
"""How an answer ends that is one: at its end token, or cut where it was to be cut."""


class VllmBackend:
    """A model directory run by vLLM. Prompts are encoded and completions decoded as by the backend `hf`.

    Args:
        model_dir: a Hugging Face model directory with tokenizer files.
        batch_size: completions written at once; None = vLLM's own number.
        tensor_parallel_size: GPUs; None = as many of the visible ones as can share the model's heads evenly.
        dtype: of weights and arithmetic by vLLM's names; None = float32 on a CPU and the checkpoint's own on a GPU.

    Until it is closed, SIGTERM ends vLLM's processes before it ends this one, where nobody else listens to it: they would keep their GPUs.

    Raises:
        EvaluationError: vLLM is not installed, or cannot load the model, or that computes no numbers.
    """

    name = "vllm"

    def __init__(
        self,
        model_dir: Path | str,
        *,
        batch_size: int | None = None,
        tensor_parallel_size: int | None = None,
        dtype: str | None = None,
    ):
        import torch

        model_dir = Path(model_dir)
        require_model(model_dir)
        self.tokenizer = load_tokenizer(model_dir)
        self._vllm = _library()
        self.versions: Mapping[str, str] = {"torch": torch.__version__, "vllm": self._vllm.__version__}
        visible = torch.cuda.device_count()
        size = tensor_parallel_size or shared_by(model_dir, visible)
        if visible and size > visible:
            raise EvaluationError(
                f"tensor_parallel_size is {size} and {visible} GPUs are visible: give at most {visible}"
            )
        if visible > size:
            log.info("%d of %d visible GPUs run %s", size, visible, model_dir)
        own: dict[str, Any] = {} if batch_size is None else {"max_num_seqs": batch_size}
        if not visible:  # compiling takes minutes on a CPU
            own |= {"enforce_eager": True}
        self._dead: type[Exception] = importlib.import_module("vllm.v1.engine.exceptions").EngineDeadError
        self._listens = _end_processes_first()
        try:
            self._engine = self._load(
                model_dir, tensor_parallel_size=size, dtype=dtype or ("auto" if visible else "float32"), **own
            )
        except BaseException:
            self._stop_listening()
            raise
        self._asked = 0
        self._name = model_dir
        try:  # before hours are spent on a model that computes no numbers
            self.loglikelihood([("one", " two three")])
        except BaseException:
            self.close()
            raise

    def _load(self, model_dir: Path, **own: Any) -> Any:
        before = _at_work()
        try:
            llm = self._vllm.LLM(
                model=str(model_dir),
                enable_prefix_caching=True,
                logprobs_mode="raw_logprobs",
                generation_config="vllm",  # nothing of generation_config.json: a protocol says all there is to say
                seed=0,
                **own,
            )
        except (ImportError, OSError, ValueError, RuntimeError, self._dead) as error:
            raise EvaluationError(
                f"vLLM cannot load {model_dir} ({one_line(error)}; its own lines are above): {MEND}"
            ) from error
        self._begun = [begun for begun in _at_work() if begun not in before]
        self._begun += _tell_of_the_end(self._begun, llm.llm_engine.engine_core)
        self._room = int(llm.llm_engine.model_config.max_model_len)
        return llm.llm_engine

    def close(self) -> None:
        """End vLLM's processes, which frees their GPUs, and its threads here; nothing can be asked any more.

        The interpreter's end is too late for it: a thread that watches the processes may see them go while Python no longer lets
        threads run, and then a command that has done its work ends with an abort (exit code 134).
        """
        self._engine.engine_core.shutdown()
        end = time.monotonic() + _END_SECONDS
        for begun in self._begun:  # vLLM itself does not wait for processes that it killed, nor for threads
            begun.join(max(0.0, end - time.monotonic()))
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._listens = False

    def generate(
        self,
        prompts: Sequence[str],
        *,
        protocol: Protocol,
        seeds: Sequence[int] = (),
        done: Done[Completion] = ignore,
    ) -> list[Completion]:
        """Completions, greedy or drawn, each with the generator of its own seed.

        Raises:
            EvaluationError: a prompt is as long as the model's context, or there is not one seed a prompt.
        """
        require_seeds(prompts, protocol, seeds)
        how = {"temperature": protocol.temperature, "top_p": protocol.top_p}
        asked = [
            (
                prompt_tokens(self.tokenizer, prompt),
                self._sampling(
                    **how, max_tokens=protocol.max_tokens, seed=seeds[i] if protocol.temperature > 0 else None
                ),
            )
            for i, prompt in enumerate(prompts)
        ]
        found: dict[int, Completion] = {}

        def read(place: int, output: Any) -> None:
            found[place] = completion(self.tokenizer, list(output.outputs[0].token_ids))
            done(place, found[place])

        self._run(asked, read)
        return [found[i] for i in range(len(prompts))]

    def choice_logprobs(
        self, prompts: Sequence[str], choices: Sequence[str], *, done: Done[list[float]] = ignore
    ) -> list[list[float]]:
        """For every prompt the log probability of each choice as its continuation (sum over the choice's tokens).

        A choice of one token is made the only one that may come next: its probability is that among all tokens, and the prompt, which
        all choices share, is computed once. Longer ones are scored as text.
        """
        asked: list[tuple[list[int], Any]] = []
        places: list[tuple[int, int, int]] = []
        for i, prompt in enumerate(prompts):
            start = prompt_tokens(self.tokenizer, prompt)
            for j, choice in enumerate(choices):
                tail = choice_tokens(self.tokenizer, start, prompt, choice)
                alone = len(tail) == 1
                params = {"allowed_token_ids": tail, "logprobs": 0} if alone else {"prompt_logprobs": 0}
                asked.append((start if alone else start + tail, self._sampling(**params, max_tokens=1)))
                places.append((i, j, 0 if alone else len(tail)))
        found: list[dict[int, float]] = [{} for _ in prompts]

        def read(place: int, output: Any) -> None:
            i, j, length = places[place]
            found[i][j] = _of_text(output, length) if length else _of_next(output)
            require_numbers([found[i][j]], self._name)
            if len(found[i]) == len(choices):
                done(i, [found[i][j] for j in range(len(choices))])

        self._run(asked, read)
        return [[row[j] for j in range(len(choices))] for row in found]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """Log probability of each continuation after its prompt; the end token is not scored."""
        encoded = [encode_pair(self.tokenizer, prompt, text, end=False) for prompt, text in pairs]
        found: dict[int, LogLikelihood] = {}

        def read(place: int, output: Any) -> None:
            length = len(encoded[place][0]) - encoded[place][1]
            found[place] = LogLikelihood(_of_text(output, length), length)
            require_numbers([found[place].logprob], self._name)

        self._run([(ids, self._sampling(prompt_logprobs=0, max_tokens=1)) for ids, _ in encoded], read)
        return [found[i] for i in range(len(pairs))]

    def _sampling(self, **how: Any) -> Any:
        final = importlib.import_module("vllm.sampling_params").RequestOutputKind.FINAL_ONLY
        how = {"temperature": 0.0, **how}
        # The end tokens are named, so that no other one of config.json or generation_config.json ends a completion.
        return self._vllm.SamplingParams(
            **how,
            ignore_eos=True,
            stop_token_ids=list(end_tokens(self.tokenizer)),
            detokenize=False,
            output_kind=final,
        )

    def _run(self, asked: Sequence[tuple[Sequence[int], Any]], read: Callable[[int, Any], None]) -> None:
        """Hands everything to vLLM's scheduler and each answer to `read` as it comes.

        Raises:
            EvaluationError: a prompt leaves no room for an answer, or vLLM's engine ended.
        """
        require_room((len(ids) for ids, _ in asked), self._room)
        first, self._asked = self._asked, self._asked + len(asked)
        try:
            for number, (ids, params) in enumerate(asked, start=first):
                self._engine.add_request(str(number), {"prompt_token_ids": list(ids)}, params)
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    if output.finished:
                        # An engine that is told to end gives up what it is at.
                        if output.outputs[0].finish_reason not in _WHOLE:
                            raise _EngineEnded
                        read(int(output.request_id) - first, output)
        except (_EngineEnded, self._dead) as error:
            raise EvaluationError(
                "vLLM's engine ended before everything was answered (its own lines, where it wrote any, are above): where memory ran out, of a GPU or of "
                "the machine, give a smaller --batch-size or more of it, and start again: answers so far are kept"
            ) from error
        except BaseException:
            with contextlib.suppress(Exception):  # of an engine that ends as well
                self._engine.abort_request([str(number) for number in range(first, self._asked)])
            raise


class _EngineEnded(Exception):
    """vLLM's engine gives no more answers."""


def _tell_of_the_end(begun: Sequence[BaseProcess | threading.Thread], core: Any) -> list[threading.Thread]:
    """A thread that says it to who waits for answers when one of vLLM's processes has ended; none where the engine is in this process.

    vLLM tells of an engine that failed; of one that was killed, as the system does where memory runs out, its client would wait for answers for ever.
    """
    sentinels = [one.sentinel for one in begun if isinstance(one, BaseProcess)]
    answers = getattr(core, "outputs_queue", None)
    if not sentinels or answers is None:
        return []

    def tell() -> None:
        connection.wait(sentinels)
        answers.put_nowait(_EngineEnded())

    thread = threading.Thread(target=tell, name="end of vLLM", daemon=True)
    thread.start()
    return [thread]


def _end_processes_first() -> bool:
    """Whether SIGTERM, which would end this process alone, now ends those that it began first: vLLM's engine does not see that this one has gone."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return False

    def end(number: int, _: Any) -> None:
        for process in multiprocessing.active_children():
            process.terminate()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end)
    return True


def _at_work() -> list[BaseProcess | threading.Thread]:
    """Processes that this one began, and its threads."""
    return [*multiprocessing.active_children(), *threading.enumerate()]


def require_vllm() -> None:
    """Whether vLLM is installed, which importing it takes seconds to say.

    Raises:
        EvaluationError: it is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise _unusable("lacks")


def _library() -> Any:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        missing = getattr(error, "name", None) == "vllm"
        raise _unusable("lacks" if missing else f"cannot import ({one_line(error)})") from error


def _unusable(how: str) -> EvaluationError:
    return EvaluationError(
        f"backend vllm needs vLLM, which {sys.executable} {how}: run asft eval in an environment of its own that has it (docs/evaluation.md), or in "
        "the image of the Dockerfile's target eval, or choose backend hf"
    )


def shared_by(model_dir: Path, visible: int) -> int:
    """The largest number of visible GPUs that can share a model's attention heads evenly; 1 without a GPU."""
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    heads = int(config.get("num_attention_heads", 1))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    return max((n for n in range(1, visible + 1) if share_heads(heads, kv_heads, n)), default=1)


def _of_next(output: Any) -> float:
    (row,) = output.outputs[0].logprobs
    return float(row[output.outputs[0].token_ids[0]].logprob)


def _of_text(output: Any, length: int) -> float:
    """The sum over the last `length` tokens of the text that was asked about."""
    ids = output.prompt_token_ids
    places = range(len(ids) - length, len(ids))
    return sum(float(output.prompt_logprobs[i][ids[i]].logprob) for i in places)
