"""What `asft doctor` says of GPUs. torch is imported only where the driver shows some: it takes seconds, and may be broken or missing."""

from __future__ import annotations

import importlib
from typing import Any

from asft_nemo.config import machine
from asft_nemo.config.devices import peak_tflops

_IMAGE = "docs/container.md"
_FP8_FROM = (8, 9)  # compute capability


def gpus() -> list[tuple[str, str, bool]]:
    """What was looked at, what is there, and whether it must be mended."""
    if machine.forced_to_cpu():
        words = "left alone, for ASFT_DEVICE=cpu: everything runs on CPU ranks (gloo), to try it and not for speed"
        return [("GPUs", words, False), ("NCCL", _GLOO, False)]
    count = machine.gpu_count()
    if not count:
        words = "none: everything runs on CPU ranks (gloo), to try it and not for speed"
        return [("GPUs", words, False), ("NCCL", _GLOO, False)]
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: one of its libraries cannot be loaded
        return [("GPUs", f"{count}, and torch cannot be imported to use them ({_first_line(error)})", True)]
    return [("GPUs", *_named(torch, count)), ("NCCL", _nccl(torch), False)]


_GLOO = "not used: CPU ranks talk by gloo"


def _named(torch: Any, count: int) -> tuple[str, bool]:
    """The GPUs by name, asked of torch, which must be able to use them."""
    cure = "install a build of torch for CUDA, or update the driver"
    if not torch.cuda.is_available():
        return (
            f"{count} that torch {torch.__version__} cannot use: {cure}; to do without them, set ASFT_DEVICE=cpu",
            True,
        )
    try:
        devices = range(torch.cuda.device_count())
        names = [torch.cuda.get_device_name(index) for index in devices]
        able = [torch.cuda.get_device_capability(index) for index in devices]
    except RuntimeError as error:  # a GPU that has fallen off the bus, or is another one's alone
        return f"{count} that do not answer ({_first_line(error)}): nvidia-smi shows more", True
    kinds = [_kind(name, names.count(name), able[names.index(name)]) for name in dict.fromkeys(names)]
    return "; ".join(kinds), False


def _kind(name: str, count: int, able: tuple[int, int]) -> str:
    words = f"{count} x {name}, compute capability {able[0]}.{able[1]} ({'FP8' if able >= _FP8_FROM else 'no FP8'})"
    if peak_tflops(name, "bf16") is None:
        words += ", whose speed is not known here: mfu is null unless you give trainer.peak_tflops"
    return words


def _nccl(torch: Any) -> str:
    """Its version as torch was built with it."""
    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return f"missing in torch {torch.__version__}: {_IMAGE} has it, and so has a build of torch for CUDA"
    return f"{'.'.join(map(str, torch.cuda.nccl.version()))}, CUDA {torch.version.cuda}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
