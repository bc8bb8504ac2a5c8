"""Whether the training of a launch fits the GPUs of its cluster, by the planner's arithmetic: known before anything waits in a queue."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from asft_nemo.config.cluster_rules import on_slurm, ranks_per_node
from asft_nemo.config.model_shape import ModelShape
from asft_nemo.config.recipes import recipe_gpu, recipe_model
from asft_nemo.config.schema import RunConfig
from asft_nemo.errors import ConfigError
from asft_nemo.planner.gpus import gpu
from asft_nemo.planner.plan import Plan, plan_of
from asft_nemo.planner.published import spec_of_recipe, spec_of_run
from asft_nemo.planner.time import shape_of
from asft_nemo.planner.words import slow_groups, verdict

_ON_CPUS = "ASFT_DEVICE=cpu"  # in cluster.env


def published_shape(run: RunConfig) -> ModelShape | None:
    """The sizes of the model that the recipe is made for, for rules that cannot read those of model.path; None where it can be read."""
    spec = None if Path(run.model.path).is_dir() else spec_of_recipe(run.recipe)
    return None if spec is None else shape_of(spec)


def training_plan(run: RunConfig) -> Plan | None:
    """The plan of a run on its cluster's GPUs: `cluster.gpu`, or those that the recipe is made for.

    Returns:
        None where there are no GPUs to plan for: ranks on CPUs, or a recipe that is made for no published model.
    """
    here_on_cpus = not on_slurm(run) and os.environ.get("ASFT_DEVICE", "").lower() == "cpu"
    if here_on_cpus or _ON_CPUS in run.cluster.env or recipe_model(run.recipe) is None:
        return None
    return plan_of(run, spec_of_run(run), gpu(run.cluster.gpu or recipe_gpu(run.recipe)))


def refuse_too_large(plan: Plan) -> None:
    """Refuses a launch that its GPUs cannot hold.

    Raises:
        ConfigError: what is too large, and what would fit.
    """
    if not plan.fits:
        raise ConfigError(
            f"the training on {plan.gpu.name} {verdict(plan, gpu_word='cluster.gpu=')}. If the GPUs are others, set cluster.gpu; to "
            "launch it all the same, add --force"
        )


def in_words(plan: Plan) -> str:
    """One line for the launch's own plan."""
    return (
        f"training needs {plan.needed / 2**30:.1f} of {plan.gpu.memory / 2**30:.1f} GiB of each {plan.gpu.name} and "
        f"{plan.step.seconds:.1f} s a step, by asft plan"
    )


def warnings(run: RunConfig, plan: Plan | None) -> list[str]:
    """What works, and not as one would wish."""
    found = []
    if plan is not None and not plan.fits:
        found.append("training will run out of memory, if the plan is right")
    if on_slurm(run):
        found += slow_groups(run)
        found += [] if plan is None else _left_to_slurm(run)
    return found


def _left_to_slurm(run: RunConfig) -> list[str]:
    """A sentence where nothing says how many cores and how much memory the ranks on GPUs get; none where anything does."""
    cluster, each = run.cluster, ranks_per_node(run)
    by_words = any(
        word.lower().replace("_", "-").startswith(("mem-per-", "cpus-per-")) for word in cluster.sbatch_args
    )
    whole_nodes = cluster.exclusive or not cluster.request_gpus
    if whole_nodes or cluster.mem or cluster.cpus_per_task or by_words or run.run.world_size == 1:
        return []
    return [
        f"the training asks for neither cores nor memory, and a Slurm without defaults of its own gives each of a node's ranks ({each}) one core "
        "and the memory of that core (DefMemPerCPU), too little for a checkpoint, which is copied to host memory to be written: set "
        f"cluster.exclusive=true cluster.mem=\"'0'\" cluster.cpus_per_task=<cores of a node / {each}>, or where nodes are shared the part of "
        "them that you need"
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """The same for programs."""
    return {
        "gpu": plan.gpu.name,
        "gpu_bytes": plan.gpu.memory,
        "needed_bytes": plan.needed,
        "fits": plan.fits,
        "step_seconds": plan.step.seconds,
    }
