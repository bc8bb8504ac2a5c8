"""Memory that runs out, of a GPU or of the machine: one sentence with its cure instead of torch's lines."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from asft_eval.errors import EvaluationError, one_line

_MORE_GPUS = "run where more GPUs are visible (CUDA_VISIBLE_DEVICES) and nothing else uses them"
_MORE_MEMORY = "run on a machine with more memory"
_OF_THE_MACHINE = "DefaultCPUAllocator"
#: How CUDA and cuBLAS say it where torch makes no OutOfMemoryError of it.
_OF_A_GPU = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def memory_for(what: str, *, before: str = "", instead: str = "") -> Generator[None, None, None]:
    """Memory that runs out within becomes a sentence, whose cure is more GPUs, or more memory where there is none.

    Args:
        what: the memory was for.
        before: what to try before that.
        instead: what to try behind that, where a GPU's memory ran out.

    Raises:
        EvaluationError: it ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        more = (_MORE_MEMORY,) if _OF_THE_MACHINE in str(error) else (_MORE_GPUS, instead)
        *first, last = [cure for cure in (before, *more) if cure]
        cures = f"{', '.join(first)}, or {last}" if first else last
        raise EvaluationError(f"the memory is too small {what} ({_short(error)}): {cures}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether that is why torch, CUDA or cuBLAS gave up."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in (*_OF_A_GPU, _OF_THE_MACHINE)
    )


def _short(error: BaseException) -> str:
    """What was asked for and what there is, without the processes and settings that torch lists behind that."""
    return "; ".join(one_line(error).split(". ")[:3])
