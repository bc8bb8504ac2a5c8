"""Whether what evaluates can load the model: its heads shared among GPUs, its weights in their memory, and vLLM at all.

All of it would fail behind the training, when that has been paid for.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from asft_eval.backends.placement import share_heads

from asft_nemo.config.cluster_rules import on_slurm
from asft_nemo.config.schema import RunConfig
from asft_nemo.errors import UserError
from asft_nemo.launching.eval_gpus import eval_gpu, eval_gpus, eval_weights, free_memory, held_by_a_node
from asft_nemo.model.spec import ModelSpec
from asft_nemo.planner.published import spec_of_run

_GIB = 2**30
_OF_VLLM = 0.9
"""Share of a GPU's memory that vLLM uses (gpu_memory_utilization), for weights and everything else."""


def unfit(run: RunConfig) -> Iterator[str]:
    """A sentence for what is too large, or cannot be shared, as far as the model is known here."""
    size = run.eval.tensor_parallel_size
    if on_slurm(run) and size is not None and size > run.cluster.gpus_per_node:
        return  # said already
    spec = _spec(run) if _runs_vllm(run) else None
    shares = [] if spec is None else _shares(run, spec)
    if spec is not None and size is not None and size not in shares:
        heads, kv_heads = spec.num_attention_heads, spec.num_query_groups
        yield (
            f"eval.tensor_parallel_size={size} GPUs cannot share {heads} attention heads and {kv_heads} key/value heads evenly: set {_listed(shares)}"
        )
        return
    weights = eval_weights(run)
    if weights is None or not on_slurm(run) or "ASFT_DEVICE=cpu" in run.cluster.env:
        return
    if (run.eval.drift is not None or not _runs_vllm(run)) and weights > held_by_a_node(run):
        yield _node_too_small(run, weights)
    elif shares:
        yield from _vllm_memory(run, weights, shares)


def without_vllm(run: RunConfig) -> Iterator[str]:
    """A sentence where this Python is to run vLLM and has none."""
    cluster = run.cluster
    elsewhere = cluster.asft or cluster.container_image or cluster.eval_image
    if not _runs_vllm(run) or elsewhere or any(word.startswith("PYTHONPATH=") for word in cluster.env):
        return
    if find_spec("vllm") is None:
        yield (
            "eval.backend=vllm needs vLLM, and the Python that would evaluate is this one, which lacks it: set eval.backend=hf, or cluster.asft or "
            "cluster.eval_image to one that has it (docs/evaluation.md)"
        )


def _runs_vllm(run: RunConfig) -> bool:
    return bool(run.eval.suites) and run.eval.backend == "vllm"


def _spec(run: RunConfig) -> ModelSpec | None:
    try:
        return spec_of_run(run)
    except UserError:  # a model that no recipe names and that cannot be looked at from here
        return None


def _shares(run: RunConfig, spec: ModelSpec) -> list[int]:
    """Numbers of GPUs that can share the model's heads: of a node's, or as many as are asked for on this machine."""
    heads, kv_heads = spec.num_attention_heads, spec.num_query_groups
    most = max(run.cluster.gpus_per_node, run.eval.tensor_parallel_size or 1)
    return [n for n in range(1, most + 1) if share_heads(heads, kv_heads, n)]


def _vllm_memory(run: RunConfig, weights: int, shares: list[int]) -> Iterator[str]:
    """Args: shares: numbers of GPUs that can share the heads."""
    each = _OF_VLLM * free_memory(run)
    visible = eval_gpus(run) if run.cluster.request_gpus else run.cluster.gpus_per_node
    size = run.eval.tensor_parallel_size or max(n for n in shares if n <= visible)
    if weights <= each * size:
        return
    enough = [n for n in shares if weights <= each * n]
    if not enough:
        yield _node_too_small(run, weights)
        return
    yield (
        f"vLLM would run on {size} GPU{'s' if size > 1 else ''} and has {each * size / _GIB:.1f} GiB of {eval_gpu(run).name} there, and the weights take "
        f"{weights / _GIB:.1f} GiB: set eval.tensor_parallel_size to {_listed(enough)}, or cluster.gpu if the GPUs are others"
    )


def _node_too_small(run: RunConfig, weights: int) -> str:
    number, name = run.cluster.gpus_per_node, eval_gpu(run).name
    return (
        f"the evaluation runs on one node, whose {number} x {name} (cluster.gpus_per_node) are too small for weights of {weights / _GIB:.1f} GiB and what a pass "
        "needs beside them: set cluster.gpu if the GPUs are others, or leave the stages eval and compare out with --stages"
    )


def _listed(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
