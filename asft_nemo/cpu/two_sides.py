"""Host and device told apart where both are the CPU, for upstream code that asks a tensor whether it is on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_IS_CUDA: Any = torch.Tensor.is_cuda.__get__  # pyright: ignore[reportAttributeAccessIssue]


class TwoSides(TorchFunctionMode):
    """A tensor is on the device, and `is_cuda` says so, unless `.cpu()` made it or something that `.cpu()` made."""

    def __init__(self) -> None:
        super().__init__()
        self._host: dict[int, torch.Tensor] = {}  # held, so that no other tensor gets one's id

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        on_host = any(id(value) in self._host for value in args)
        if func == _IS_CUDA:
            return not on_host
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu and result is args[0]:
            result = result.view_as(result)  # a tensor of its own: the one that was asked stays on the device
        if torch.is_tensor(result) and (on_host or func is torch.Tensor.cpu):
            self._host[id(result)] = result
        return result


def two_sided(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, with a host and a device side while it runs."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with TwoSides():
            return method(*args, **kwargs)

    return run
