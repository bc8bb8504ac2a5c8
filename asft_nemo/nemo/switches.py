"""From the settings that only change speed or memory to what Megatron and NeMo are told. Their rules are in `config/kernel_rules.py`."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import layers
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

from asft_nemo.config.machine import FUSED_WEIGHT_GRADIENT, has_fused_softmax
from asft_nemo.config.schema import RunConfig, data_parallel_size
from asft_nemo.cpu import backend
from asft_nemo.errors import ConfigError
from asft_nemo.nemo.layer_spec import uses_transformer_engine

# Kernels that only exist on a GPU.
_ON_CPU: dict[str, Any] = {
    "use_cpu_initialization": True,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "batch_p2p_sync": False,
}


def layer_kernels(run: RunConfig) -> dict[str, Any]:
    """Which kernels the layers are computed by; the three that Megatron leaves out by default are in NeMo's own Llama and Qwen recipes."""
    if backend.active():
        return _ON_CPU
    fused = run.kernels.fusions
    return {
        # Unfused, SwiGLU keeps silu(gate) and one copy more for backward, the rotary embedding its cosines and sines: at 72B and 4096
        # tokens 45 % more activations (docs/planner.md). Torch compiles the first two kernels, Transformer Engine has the third.
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "apply_rope_fusion": fused and uses_transformer_engine(),
        # Of Megatron's own layers. The causal kernel sees no mask, and Megatron takes it to be there: the first pass would not find it.
        "masked_softmax_fusion": has_fused_softmax() and not (run.data.packing or run.parallel.cp_size > 1),
    }


def fused_gradients(run: RunConfig) -> bool:
    """Whether linear layers add their weight gradients to `main_grad` inside their GEMM (Megatron's `gradient_accumulation_fusion`).

    Raises:
        ConfigError: asked for, and Megatron could not import apex's kernel. Transformer Engine's layers have one of their own, but
            Megatron builds the output layer, which is its own, with the same flag and refuses to.
    """
    asked, there = run.kernels.gradient_accumulation_fusion, layers._grad_accum_fusion_available
    if asked is None:
        return there and not backend.active()  # apex may be installed where ranks run on the CPU
    if asked and not there:
        raise ConfigError(
            f"kernels.gradient_accumulation_fusion=true, and {FUSED_WEIGHT_GRADIENT} of apex cannot be imported: leave the setting out"
        )
    return asked


def recomputed(run: RunConfig) -> dict[str, Any]:
    """Megatron's arguments for activations that are computed again."""
    asked = run.recompute
    if asked.granularity == "none":
        return {}
    if asked.granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(asked.modules)}
    return {
        "recompute_granularity": asked.granularity,
        "recompute_method": asked.method,
        "recompute_num_layers": asked.num_layers,
    }


def offload_state(config: OptimizerConfig, run: RunConfig) -> OptimizerConfig:
    """The same config, with this run's share of the optimizer's state in host memory (Megatron's `HybridDeviceOptimizer`)."""
    if not run.optim.cpu_offload:
        return config
    config.optimizer_cpu_offload = True
    config.optimizer_offload_fraction = run.optim.cpu_offload
    # The code path that hands over masters too: without it they would stay on the device beside their copies. Set afterwards, for the
    # constructor compares Transformer Engine's version even where there is none.
    config.use_precision_aware_optimizer = True
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    # Overlapped, the device would not wait for the parameters that come back: the hook behind a CPU step waits for the stream that
    # took the gradients (`_register_param_copy_back_gpu_hook`, megatron-core 0.15.3).
    config.overlap_cpu_optimizer_d2h_h2d = False
    return config


def point_to_point(run: RunConfig) -> dict[str, Any]:
    """How pipeline stages exchange activations and gradients.

    Interleaved stages send forward and backward between the same two ranks at once. Batched, such messages are matched by order alone
    and at pp_size=2 arrive as one another (Megatron-LM asserts against it, NeMo does not); single ones do not. Overlapped sends need a
    device's stream order: gloo would still be reading an output that the schedule has freed.
    """
    interleaved = run.parallel.vpp_size is not None
    return {"batch_p2p_comm": not interleaved, "overlap_p2p_comm": interleaved and not backend.active()}


def tensor_overlap(run: RunConfig) -> list[MegatronCommOverlapCallback]:
    """NeMo's callback for `parallel.tp_comm_overlap`, which makes Transformer Engine's buffers before the first step; none without.

    Unless told otherwise the callback also chooses the other overlaps, so it is told what this run's settings say.
    """
    if not run.parallel.tp_comm_overlap:
        return []
    return [
        MegatronCommOverlapCallback(
            tp_comm_overlap=True,
            **point_to_point(run),
            overlap_grad_reduce=run.optim.overlap_grad_reduce,
            overlap_param_gather=run.optim.overlap_param_gather,
            overlap_param_gather_with_optimizer_step=False,  # NeMo: an issue with checkpointing
            align_param_gather=False,
            # Megatron's own default, which None would not leave alone (`DistributedDataParallel`, megatron-core 0.15.3)
            bucket_size=max(40_000_000, 1_000_000 * data_parallel_size(run)),
        )
    ]
