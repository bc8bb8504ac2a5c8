"""One table of patches that lets NeMo 2 and Megatron-core train on CPU with gloo.

Upstream asks for CUDA in many small places (`torch.cuda.current_device()`, `device="cuda"`, `"torch.cuda.FloatTensor"`). Each row of
`PATCHES` answers one of them on CPU: the symbol, why upstream needs it, the upstream version it was written for, and a guard that
raises when upstream has moved, instead of patching blindly. Rows of stage ``before_megatron`` must be in place before megatron is
imported (it captures tensor types in tuples); rows of stage ``after_megatron`` and ``after_nemo`` patch those packages' own modules
(the last only where NeMo is used at all: importing it takes seconds).

`install()` is used only where no GPU is there, or where ``ASFT_DEVICE=cpu`` asks for it. It never touches a GPU machine otherwise.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from asft_nemo.cpu.two_sides import two_sided
from asft_nemo.errors import UserError

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


class UpstreamMovedError(RuntimeError):
    """A patched symbol is not where the table expects it: the row must be looked at again."""


class _InertStream:
    """Stands for a CUDA stream or event: work on CPU is already in order, so every method does nothing."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> _InertStream:
        return self

    def __exit__(self, *exc: Any) -> bool:
        return False

    def query(self) -> bool:
        return True

    def elapsed_time(self, *args: Any) -> float:
        return 0.0

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    def record_event(self, *args: Any, **kwargs: Any) -> _InertStream:
        return self

    wait = wait_stream = wait_event = synchronize = record = _nothing


def _tensor_class(dtype: torch.dtype) -> type:
    """A class that builds CPU tensors of `dtype` and whose isinstance looks at the dtype, like `torch.cuda.FloatTensor`."""

    class Meta(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return torch.is_tensor(value) and value.dtype == dtype

    class CpuTensor(metaclass=Meta):
        def __new__(cls, *args: Any) -> torch.Tensor:  # type: ignore[misc]
            return torch.tensor(*args, dtype=dtype)

    return CpuTensor


def _means_cuda(device: Any) -> bool:
    if device is None:
        return False
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, str) and device.split(":")[0] == "cuda"


class CudaMeansCpu(TorchFunctionMode):
    """Turns requests for the CUDA device into requests for the CPU in every torch call below it."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if kwargs:
            if _means_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.pin_memory or func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _means_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # clip_grads and the optimizers compare this string with "torch.cuda.FloatTensor"
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Patch:
    """One row: `symbol` (module:attribute), the replacement, why upstream needs it, and the version it was written for."""

    symbol: str
    replacement: Callable[[], Any]
    reason: str
    upstream: str
    stage: str = "before_megatron"

    def apply(self) -> None:
        """Replaces the symbol.

        Raises:
            UpstreamMovedError: when the module or the attribute is no longer there.
        """
        module_name, _, attribute = self.symbol.partition(":")
        holder: Any = importlib.import_module(module_name)
        *path, last = attribute.split(".")
        for part in path:
            holder = getattr(holder, part, None)
        if holder is None or not hasattr(holder, last):
            raise UpstreamMovedError(
                f"the CPU backend patches {self.symbol} ({self.reason}; written for {self.upstream}), which is not there any more: "
                "look at this row of asft_nemo/cpu/backend.py"
            )
        setattr(holder, last, self.replacement())


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def _cpu_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _own_copy(replacement: Any) -> Any:
    """A function object of its own for each symbol: torch.compile keeps a rule per object and refuses one under two names."""
    if isinstance(replacement, types.FunctionType):
        return types.FunctionType(
            replacement.__code__, replacement.__globals__, replacement.__name__, replacement.__defaults__
        )
    return replacement


def _gloo_on_one_device() -> type:
    """ProcessGroupGloo whose groups share one device, that is one thread that waits for messages.

    torch makes a device for each group, and its thread wakes up every 10 ms. Megatron makes some 35 groups a run: on a machine with
    few cores, the threads of a few ranks take a good part of it.
    """
    from torch.distributed.distributed_c10d import ProcessGroupGloo

    made: list[Any] = []

    class OneDeviceGloo(ProcessGroupGloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: Any):
            if not made:
                made.append(ProcessGroupGloo.create_default_device())
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices, options._threads, options._timeout = made, 2, timeout
            super().__init__(store, rank, size, options)

    return OneDeviceGloo


def _hybrid_optimizer() -> Any:
    from megatron.core.optimizer.cpu_offloading import hybrid_optimizer

    return hybrid_optimizer.HybridDeviceOptimizer


def _cuda(name: str, replacement: Any, reason: str) -> Patch:
    return Patch(f"torch.cuda:{name}", lambda: _own_copy(replacement), reason, "torch 2.13.0")


_DTYPES = {
    "FloatTensor": torch.float32,
    "DoubleTensor": torch.float64,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
    "ByteTensor": torch.uint8,
}

PATCHES: tuple[Patch, ...] = (
    _cuda("current_device", lambda: CPU, "parameters and buffers are created on the current device"),
    _cuda("set_device", _nothing, "each rank selects its GPU at start"),
    _cuda("device_count", lambda: 1, "device meshes are sized by it"),
    _cuda("synchronize", _nothing, "called around point-to-point exchanges and timers"),
    _cuda("empty_cache", _nothing, "called before loading a checkpoint"),
    _cuda("Stream", _InertStream, "side streams for copies and communication"),
    _cuda("Event", _InertStream, "ordering between streams"),
    _cuda("stream", lambda stream: contextlib.nullcontext(), "DDP is built on a side stream"),
    _cuda("current_stream", lambda *a: _InertStream(), "waits between streams"),
    _cuda("default_stream", lambda *a: _InertStream(), "waits between streams"),
    _cuda("get_rng_state", _cpu_rng_state, "dropout forks per tensor-parallel rank"),
    _cuda("set_rng_state", _set_cpu_rng_state, "dropout forks per tensor-parallel rank"),
    _cuda("manual_seed", lambda seed: torch.manual_seed(seed), "model-parallel seeds"),
    _cuda(
        "manual_seed_all", _nothing, "torch.manual_seed calls it; the CPU generator is seeded there already"
    ),
    _cuda("memory_allocated", _zero, "memory logging"),
    _cuda("max_memory_allocated", _zero, "memory logging"),
    _cuda("memory_reserved", _zero, "memory logging"),
    _cuda("max_memory_reserved", _zero, "memory logging"),
    _cuda("default_generators", (torch.default_generator,), "generator states of the random tracker"),
    Patch(
        "torch.cuda.random:get_rng_state",
        lambda: _own_copy(_cpu_rng_state),
        "checkpointed random states",
        "torch 2.13.0",
    ),
    Patch(
        "torch.cuda.random:set_rng_state",
        lambda: _own_copy(_set_cpu_rng_state),
        "checkpointed random states",
        "torch 2.13.0",
    ),
    Patch(
        "torch.nn:Module.cuda",
        lambda: lambda self, device=None: self,
        "modules are moved to the GPU after construction",
        "torch 2.13.0",
    ),
    *(
        _cuda(name, _tensor_class(dtype), "megatron tests tensor types against torch.cuda classes")
        for name, dtype in _DTYPES.items()
    ),
    Patch(
        "torch.distributed.distributed_c10d:ProcessGroupGloo",
        _gloo_on_one_device,
        "every group of gloo has a thread of its own that wakes up 100 times a second",
        "torch 2.13.0",
    ),
    Patch(
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        lambda: _own_copy(_cpu_rng_state),
        "megatron reads the CUDA generator directly",
        "megatron-core 0.15.3",
        "after_megatron",
    ),
    Patch(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        lambda: _own_copy(_set_cpu_rng_state),
        "megatron sets the CUDA generator directly",
        "megatron-core 0.15.3",
        "after_megatron",
    ),
    Patch(
        "megatron.core.optimizer.cpu_offloading.hybrid_optimizer:HybridDeviceOptimizer._get_sub_optimizer_param_groups",
        lambda: two_sided(_hybrid_optimizer()._get_sub_optimizer_param_groups),
        "tells parameters in host memory from those on the device by is_cuda",
        "megatron-core 0.15.3",
        "after_nemo",
    ),
    Patch(
        "nemo.lightning.io.pl:_fix_tensors_device",
        lambda: lambda checkpoint: checkpoint,
        "moves loaded tensors to this rank's GPU and asserts that CUDA is initialised",
        "nemo_toolkit 2.7.3",
        "after_nemo",
    ),
)

_active = False
_nemo_done = False


def wanted() -> bool:
    """Whether this process should run on CPU: no GPU is there, or ``ASFT_DEVICE=cpu`` says so."""
    return _active or os.environ.get("ASFT_DEVICE", "").lower() == "cpu" or not torch.cuda.is_available()


def active() -> bool:
    """Whether the patches are in place in this process."""
    return _active


def install() -> bool:
    """Applies the table once, in order, and says so in one log line. Returns whether the CPU backend is active.

    On a machine with a GPU (and without ``ASFT_DEVICE=cpu``) nothing is touched and False is returned.

    Raises:
        UpstreamMovedError: when a patched symbol is gone, or megatron was imported before the patches could be.
        UserError: the machine has NVIDIA devices that torch cannot use, and nobody asked for the CPU.
    """
    global _active
    if _active:
        return True
    if not wanted():
        return False
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if devices and os.environ.get("ASFT_DEVICE", "").lower() != "cpu":
        raise UserError(
            f"this machine has {devices[0]} but torch sees no CUDA device (driver, container or a CPU build of torch): mend that, or set "
            "ASFT_DEVICE=cpu to run on CPU on purpose"
        )
    if "megatron.core.tensor_parallel" in sys.modules:
        raise UpstreamMovedError(
            "megatron was imported before the CPU backend: call asft_nemo.cpu.backend.install() first, "
            "megatron captures torch.cuda tensor types at import"
        )
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # megatron's fusers would compile C++ at the first step
    _apply("before_megatron")
    mode = CudaMeansCpu()
    mode.__enter__()
    _active = True
    _apply("after_megatron")
    logger.warning(
        "CPU backend active: %d patches let NeMo and Megatron run on gloo without a GPU", len(PATCHES) + 1
    )
    return True


def install_for_nemo() -> None:
    """Applies the rows that patch NeMo's own modules; importing `asft_nemo.nemo` calls it. Nothing on a GPU machine."""
    global _nemo_done
    if install() and not _nemo_done:
        _apply("after_nemo")
        _nemo_done = True


def _apply(stage: str) -> None:
    for patch in PATCHES:
        if patch.stage == stage:
            patch.apply()
