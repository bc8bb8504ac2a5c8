"""How many GPUs a launched evaluation asks for: one process runs it, and a GPU that it does not use is one that others wait for."""

from __future__ import annotations

from pathlib import Path

from asft_eval.backends.placement import FOR_WEIGHTS, FOR_WEIGHTS_ALONE, ITEMSIZES, gpus_for, stored_dtype
from asft_eval.errors import EvaluationError

from asft_nemo.config.recipes import recipe_gpu
from asft_nemo.config.schema import RunConfig
from asft_nemo.errors import UserError
from asft_nemo.model import parameter_count
from asft_nemo.planner.gpus import Gpu, gpu
from asft_nemo.planner.published import spec_of_run

_OF_CUDA = 2**30
"""Bytes of each GPU that are taken before there is a model."""


def eval_gpus(run: RunConfig) -> int:
    """`eval.tensor_parallel_size`; else GPUs that hold the exported model, a power of two, and all of a node where that is unknown or not enough.

    With `eval.drift` it is the larger of the two: held-out text is read by transformers, whatever vLLM is told.
    """
    size, a_node = run.eval.tensor_parallel_size, run.cluster.gpus_per_node
    if size is not None and run.eval.drift is None:
        return size
    weights = eval_weights(run)
    holding = a_node if weights is None else min(a_node, gpus_for(weights, free_memory(run)))
    return max(size or 1, holding)


def eval_weights(run: RunConfig) -> int | None:
    """Bytes of the larger of base and exported model as they are stored, which is how they are loaded on GPUs; None: no recipe names the model
    and it cannot be looked at from here.
    """
    base = Path(run.model.path)
    try:
        numbers = parameter_count(spec_of_run(run))
        of_base = ITEMSIZES[stored_dtype(base)] if (base / "config.json").is_file() else 0
    except (UserError, EvaluationError):
        return None
    return numbers * max(4 if run.precision == "fp32" else 2, of_base)


def eval_gpu(run: RunConfig) -> Gpu:
    """The kind of GPU that a launch evaluates on."""
    return gpu(run.cluster.gpu or recipe_gpu(run.recipe))


def free_memory(run: RunConfig) -> int:
    """Bytes that one of them has for a model."""
    return eval_gpu(run).memory - _OF_CUDA


def held_by_a_node(run: RunConfig) -> int:
    """Bytes of weights that transformers puts on the GPUs of a node; see `asft_eval.backends.placement.spread`."""
    number, free = run.cluster.gpus_per_node, free_memory(run)
    return number * int((FOR_WEIGHTS_ALONE if number == 1 else FOR_WEIGHTS) * free)
