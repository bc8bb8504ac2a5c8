"""What this machine has: GPUs, and packages that are used where they are and replaced where they are not. Imports none of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

from asft_nemo.config.schema import ParallelConfig


class Part(NamedTuple):
    """A package that may be missing.

    Attributes:
        name: of its distribution.
        module: what is imported.
        gives: what it is used for.
        without: what happens where it is missing.
        get: how to have it.
    """

    name: str
    module: str
    gives: str
    without: str
    get: str

    def there(self) -> bool:
        """Whether it is installed; whether it works shows at its first use."""
        return importlib.util.find_spec(self.module) is not None

    def version(self) -> str | None:
        """Its version, None where it is not installed or does not say."""
        return version_of(self.name)


_IMAGE = "it is in NVIDIA's NeMo container (docs/container.md)"

OPTIONAL: tuple[Part, ...] = (
    Part(
        "transformer-engine",
        "transformer_engine",
        "fused layers and attention in bf16 and FP8, packed rows by their lengths (THD), fused Adam",
        "layers are Megatron's local ones in bf16 or fp32; no FP8",
        _IMAGE,
    ),
    Part(
        "apex",
        "apex",
        "fused Adam where Transformer Engine is missing, fused gradient accumulation, the softmax of Megatron's own layers",
        "gradients are accumulated by a kernel of their own, and without Transformer Engine the optimizer is torch's AdamW",
        _IMAGE,
    ),
    Part(
        "flash-attn",
        "flash_attn",
        "one of the attention kernels that Transformer Engine chooses from",
        "Transformer Engine chooses cuDNN's attention; Megatron's own layers never use it",
        _IMAGE,
    ),
    Part(
        "triton",
        "triton",
        "one kernel for the loss's statistics on a GPU",
        "the loss is made of torch's own kernels",
        "it comes with torch's builds for CUDA",
    ),
    Part(
        "vllm",
        "vllm",
        "asft eval --backend vllm",
        "asft eval --backend hf",
        "pip install vllm, in an environment of its own",
    ),
)


# apex's extension behind Megatron's `gradient_accumulation_fusion`; a build of apex may lack it
FUSED_WEIGHT_GRADIENT = "fused_weight_gradient_mlp_cuda"


# apex's extensions behind Megatron's `masked_softmax_fusion` of a causal mask
FUSED_SOFTMAX = ("scaled_masked_softmax_cuda", "scaled_upper_triang_masked_softmax_cuda")


def has_fused_weight_gradient() -> bool:
    """Whether that extension is installed."""
    return importlib.util.find_spec(FUSED_WEIGHT_GRADIENT) is not None


def has_fused_softmax() -> bool:
    """Whether apex's extensions are installed that Megatron's own attention asks for with `masked_softmax_fusion`."""
    return all(importlib.util.find_spec(name) is not None for name in FUSED_SOFTMAX)


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def adam() -> str:
    """Which Adam Megatron's optimizers take: Transformer Engine's, else apex's, else torch's (megatron/core/optimizer/__init__.py)."""
    fused = [name for name in ("transformer_engine", "apex") if part(name).there()]
    if fused:
        return f"{part(fused[0]).name}'s FusedAdam"
    return f"none, so torch's AdamW: {part('apex').name} or {part('transformer_engine').name} has one"


def part(module: str) -> Part:
    """The row of `OPTIONAL` with this module."""
    return next(row for row in OPTIONAL if row.module == module)


def forced_to_cpu() -> bool:
    """Whether ASFT_DEVICE=cpu leaves the GPUs alone."""
    return os.environ.get("ASFT_DEVICE", "").lower() == "cpu"


def gpu_count() -> int:
    """GPUs that the driver shows; 0 with ASFT_DEVICE=cpu."""
    return 0 if forced_to_cpu() else len(list(Path("/dev").glob("nvidia[0-9]*")))


def order_kernels_on_the_device(layout: ParallelConfig) -> None:
    """One hardware queue, where tensor or context parallelism hides communication behind a GEMM; unless the environment says otherwise.

    Up to Hopper Megatron relies on it: the communication must be scheduled before the GEMM that fills the device
    (`LinearWithGradAccumulationAndAsyncCommunication`, megatron-core 0.15.3). CUDA reads it when the device is first used, which importing
    Transformer Engine or asking torch whether there is one may do.
    """
    if layout.tp_size > 1 or layout.cp_size > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
