"""What the ranks do for the tests of switches that change speed and memory alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from torch import Tensor


@contextlib.contextmanager
def fused_kernel_of_torch() -> Iterator[list[str]]:
    """Megatron believes in apex's `fused_weight_gradient_mlp_cuda`; torch does its work: main_grad += grad^T input, in fp32.

    Yields:
        One entry for each call.
    """
    from megatron.core.tensor_parallel import layers

    calls: list[str] = []

    def accumulate(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        calls.append("fp32")
        main_grad.add_(grad_output.float().t().matmul(total_input.float()))

    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    with (
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", kernel, create=True),
    ):
        yield calls


def gradients_by_fused_kernel(settings: dict[str, Any], *, valid: list[int], out: str) -> int:
    """`jobs.gradients` with the kernel's stand-in; returns how often it was called."""
    import jobs

    with fused_kernel_of_torch() as calls:
        jobs.gradients(settings, valid=valid, out=out)
    return len(calls)


def overlap_choices(settings: dict[str, Any]) -> dict[str, Any]:
    """What NeMo's overlap callback, as this project builds it, would write into the model's, DDP's and the optimizer's settings."""
    from jobs import run_config

    from asft_nemo.config.schema import data_parallel_size
    from asft_nemo.nemo.switches import tensor_overlap

    # isort: split
    from nemo.lightning.pytorch.callbacks import megatron_comm_overlap as upstream
    from nemo.lightning.pytorch.strategies.megatron_strategy import ParallelismConfig
    from nemo.utils import AppState

    run = run_config(settings)
    layout = run.parallel
    parallelism = ParallelismConfig(
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        microbatch_group_size_per_vp_stage=None,  # type: ignore[arg-type]
        virtual_pipeline_model_parallel_size=layout.vpp_size,  # type: ignore[arg-type]
        context_parallel_size=layout.cp_size,
        sequence_parallel=layout.sequence_parallel,
        expert_model_parallel_size=1,
        moe_extended_tp=False,
        pipeline_dtype=None,  # type: ignore[arg-type]
    )
    found: dict[str, Any] = {}
    state: Any = AppState()
    with mock.patch.object(type(state), "data_parallel_size", data_parallel_size(run)):
        for there in (True, False):
            [callback] = tensor_overlap(run)
            with mock.patch.object(upstream, "HAVE_TE", there):
                model = vars(callback._get_model_comm_overlap_cfgs(parallelism))
                trained = vars(callback._get_optimizer_overlap_cfgs(parallelism))
            found["with_te" if there else "without_te"] = {
                "model": {
                    key: model[key]
                    for key in (
                        "tp_comm_overlap",
                        "overlap_p2p_comm",
                        "batch_p2p_comm",
                        "defer_embedding_wgrad_compute",
                    )
                },
                "ddp": {
                    key: value
                    for key, value in trained.items()
                    if key.startswith(("overlap_grad", "overlap_param", "align", "bucket"))
                },
            }
    return found


def train_and_weigh_offload(settings: dict[str, Any], *, valid: list[int]) -> float:
    """A run; returns which share of this rank's optimizer state the host side held."""
    from jobs import fit
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    inner = fit(settings, valid=valid).trainer.optimizers[0].mcore_optimizer
    parts = [part.optimizer for part in getattr(inner, "chained_optimizers", [inner])]
    hybrid = [part for part in parts if isinstance(part, HybridDeviceOptimizer)]
    if not hybrid:
        return 0.0
    whole = sum(p.numel() for part in hybrid for group in part.param_groups for p in group["params"])
    host = sum(p.numel() for part in hybrid for p in part.cpu_copys_map_gpu_param)
    return host / whole


@contextlib.contextmanager
def fused_layers() -> Iterator[list[str]]:
    """CPU ranks with the GPU's choice of layer kernels; torch runs uncompiled what it would compile.

    Yields:
        The names of the fused functions' autograd rules, one for each call.
    """
    import torch
    from megatron.core.fusions import fused_bias_swiglu

    from asft_nemo.nemo import switches

    calls: list[str] = []
    original = fused_bias_swiglu.SwiGLUFunction.forward

    def counted(ctx: Any, *arguments: Any) -> Tensor:
        calls.append("SwiGLUFunction")
        return original(ctx, *arguments)

    choice = {**switches._ON_CPU, "bias_activation_fusion": True, "bias_dropout_fusion": True}
    with (
        mock.patch.object(switches, "_ON_CPU", choice),
        mock.patch.object(fused_bias_swiglu.SwiGLUFunction, "forward", staticmethod(counted)),
        torch.compiler.set_stance("force_eager"),
    ):
        yield calls


def gradients_by_fused_layers(settings: dict[str, Any], *, valid: list[int], out: str) -> int:
    """`jobs.gradients` with fused layers; returns how often the fused activation ran."""
    import jobs

    with fused_layers() as calls:
        jobs.gradients(settings, valid=valid, out=out)
    return len(calls)
