"""Backends: what runs a model. Three methods define one; a backend loads its model once for all suites.

`choice_logprobs` and `loglikelihood` score given text, `generate` writes new text. Answers come in the order of the
questions whatever the batching; `done` is told each one as soon as it is there.

    hf       transformers, on a CPU, one GPU, or several that share a model's layers
    vllm     vLLM, tensor-parallel
    openai   a server that speaks OpenAI's protocol, e.g. `vllm serve`
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeAlias, TypeVar

from asft_eval.errors import EvaluationError, did_you_mean
from asft_eval.types import Completion
from asft_eval.types import Protocol as EvaluationProtocol

_Answer = TypeVar("_Answer")
Done: TypeAlias = Callable[[int, _Answer], None]
"""Told the place of a question and its answer."""


def ignore(place: int, answer: object) -> None:
    """The `done` of who waits for all answers."""
    del place, answer


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """Log probability (natural) of a continuation: the sum over its `num_tokens` tokens."""

    logprob: float
    num_tokens: int


class Backend(Protocol):
    """What every backend offers.

    It may also have `fingerprint: str | None` of a model that is no directory here; `applies_chat_template: bool`: it wants questions of the
    prompt variant `chat` as they are; `require_logprobs()`: raises where `choice_logprobs` would, before anything is asked; `close()`: ends
    what it started, after its last question.
    """

    name: str
    versions: Mapping[str, str]

    def generate(
        self,
        prompts: Sequence[str],
        *,
        protocol: EvaluationProtocol,
        seeds: Sequence[int] = (),
        done: Done[Completion] = ignore,
    ) -> list[Completion]:
        """One completion a prompt; a prompt of which several are wanted comes several times.

        Args:
            prompts: complete, but for the tokens that the tokenizer adds to every text.
            protocol: its temperature, top_p and max_tokens; `n` and `k` are the caller's business.
            seeds: one a prompt where the temperature is above 0, so that a completion depends on nothing beside it.
            done: called in this thread, in any order.
        """
        ...

    def choice_logprobs(
        self, prompts: Sequence[str], choices: Sequence[str], *, done: Done[list[float]] = ignore
    ) -> list[list[float]]:
        """For every prompt the log probability of each choice as its continuation, in the order of `choices`.

        A choice's tokens are those that the whole text has more than the prompt alone.
        """
        ...

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """For every (prompt, continuation) the log probability of the continuation, no end token added."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a backend is opened. None = the backend's own.

    Attributes:
        batch_size: prompts run together; of a server: requests under way.
        tensor_parallel_size: GPUs over which each layer is divided.
        base_url: of a server, e.g. http://127.0.0.1:8000/v1.
        api: `completions` or `chat`, the server's interface.
    """

    batch_size: int | None = None
    tensor_parallel_size: int | None = None
    base_url: str | None = None
    api: str | None = None


OWN = Options()
"""Everything as the backend has it."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A backend: how it is opened, the options that it takes, and what it needs beside the model's arithmetic."""

    open: Callable[[Path | str, Options], Backend]
    options: frozenset[str]
    require: Callable[[Path | str], None]


def _hf(model: Path | str, options: Options) -> Backend:
    from asft_eval.backends.hf import HfBackend

    return HfBackend(model, batch_size=options.batch_size or 16)


def _vllm(model: Path | str, options: Options) -> Backend:
    from asft_eval.backends.vllm import VllmBackend

    return VllmBackend(
        model, batch_size=options.batch_size, tensor_parallel_size=options.tensor_parallel_size
    )


def _openai(model: Path | str, options: Options) -> Backend:
    from asft_eval.backends.openai import OpenAIBackend

    return OpenAIBackend(
        str(model), base_url=options.base_url, api=options.api, batch_size=options.batch_size or 32
    )


def _local(model: Path | str) -> None:
    from asft_eval.backends.tokens import require_model, require_tokenizer

    require_model(Path(model))
    require_tokenizer(Path(model))


def _local_vllm(model: Path | str) -> None:
    from asft_eval.backends.vllm import require_vllm

    _local(model)
    require_vllm()


def _nothing(model: Path | str) -> None:
    del model


BACKENDS: Mapping[str, _Row] = MappingProxyType(
    {
        "hf": _Row(_hf, frozenset({"batch_size"}), _local),
        "vllm": _Row(_vllm, frozenset({"batch_size", "tensor_parallel_size"}), _local_vllm),
        "openai": _Row(_openai, frozenset({"batch_size", "base_url", "api"}), _nothing),
    }
)
"""By name. Imports happen on opening."""


def check_options(name: str, options: Options) -> None:
    """Whether the backend of that name takes these options.

    Raises:
        EvaluationError: there is no such backend, an option that it would ignore, or a number below 1.
    """
    if name not in BACKENDS:
        raise EvaluationError(f"there is no backend {name!r}: {did_you_mean(name, sorted(BACKENDS))}")
    for option, value in asdict(options).items():
        if isinstance(value, int) and value < 1:
            raise EvaluationError(f"{option} is {value}: give at least 1")
        if value is not None and option not in BACKENDS[name].options:
            takers = [other for other, row in BACKENDS.items() if option in row.options]
            raise EvaluationError(
                f"{option} says nothing to the backend {name}: leave it out, or choose backend {' or '.join(takers)}"
            )


def require_installed(name: str, model: Path | str) -> None:
    """What can be said against a backend without loading the model.

    Raises:
        EvaluationError: what runs it is not installed, or the model's directory is not complete.
    """
    BACKENDS[name].require(model)


def open_backend(name: str, model: Path | str, options: Options) -> Backend:
    """Load a model with the backend of that name.

    Args:
        name: of `BACKENDS`.
        model: a Hugging Face model directory; for `openai` also a name that the server knows.
        options: see `Options`.

    Raises:
        EvaluationError: see `check_options`; or the model cannot be loaded, or what runs it is not here.
    """
    check_options(name, options)
    return BACKENDS[name].open(model, options)


def close(engine: object) -> None:
    """Ends what a backend, or a judge that has one, started; where it started nothing there is nothing to do."""
    getattr(engine, "close", bool)()


@contextmanager
def opened(name: str, model: Path | str, options: Options) -> Generator[Backend]:
    """`open_backend`, and `close` after the block."""
    engine = open_backend(name, model, options)
    try:
        yield engine
    finally:
        close(engine)


__all__ = [
    "BACKENDS",
    "OWN",
    "Backend",
    "Done",
    "LogLikelihood",
    "Options",
    "check_options",
    "close",
    "ignore",
    "open_backend",
    "opened",
    "require_installed",
]
