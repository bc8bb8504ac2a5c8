"""How many GPUs a launched evaluation asks for: one process runs it, and a GPU that it does not use is one that others wait for."""

from __future__ import annotations

from asft_eval.backends.placement import gpus_for

from asft_nemo.config.recipes import recipe_gpu
from asft_nemo.config.schema import RunConfig
from asft_nemo.errors import UserError
from asft_nemo.model import parameter_count
from asft_nemo.planner.gpus import gpu
from asft_nemo.planner.published import spec_of_run


def eval_gpus(run: RunConfig) -> int:
    """`eval.tensor_parallel_size`; else GPUs that hold the exported model, a power of two, and all of a node where that is unknown or not enough.

    Weights are counted in bf16, and in fp32 where the training is in fp32.
    """
    if run.eval.tensor_parallel_size is not None:
        return run.eval.tensor_parallel_size
    a_node = run.cluster.gpus_per_node
    try:
        weights = parameter_count(spec_of_run(run)) * (4 if run.precision == "fp32" else 2)
    except UserError:  # a model that no recipe names and that cannot be looked at from here
        return a_node
    return min(a_node, gpus_for(weights, gpu(run.cluster.gpu or recipe_gpu(run.recipe)).memory))
