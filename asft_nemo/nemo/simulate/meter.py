"""Bytes that are alive while tensors without data are computed with: what a GPU's allocator would hold, without its fragments."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_ATEN: Any = torch.ops.aten

_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]
META = torch.device("meta")


@dataclass(eq=False)
class Span:
    """Bytes alive at the beginning, at most, and at the end of a stretch of work."""

    start: int
    peak: int
    end: int = 0

    @property
    def kept(self) -> int:
        """What it left behind (negative where it freed more than it made)."""
        return self.end - self.start

    @property
    def rise(self) -> int:
        """The most it held at a time beyond what was there."""
        return self.peak - self.start


class LiveBytes(TorchDispatchMode):
    """Counts every tensor that an operation gives, until its storage is freed.

    Attributes:
        live: bytes of all storages that are alive and that it has seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self._sizes: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._open: list[Span] = []

    def begin(self) -> Span:
        """Starts to measure; `end` stops."""
        self._open.append(Span(self.live, self.live))
        return self._open[-1]

    def end(self, span: Span) -> None:
        """Stops measuring a span that `begin` gave."""
        self._open.remove(span)
        span.end = self.live

    @contextlib.contextmanager
    def span(self) -> Iterator[Span]:
        """Measures the work inside."""
        span = self.begin()
        try:
            yield span
        finally:
            self.end(span)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            self.count(result)
        return result

    def count(self, result: Any) -> None:
        """Begins to count the tensors in what an operation gave."""
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = (size, weakref.ref(storage, lambda _: self._forget(key)))
        self.live += size
        for span in self._open:
            span.peak = max(span.peak, self.live)

    def _forget(self, key: int) -> None:
        size, _ = self._sizes.pop(key)
        self.live -= size


class WithoutData(LiveBytes):
    """Computes shapes alone: every tensor is made on torch's meta device, and counted until its storage is freed.

    What depends on numbers is answered as for a micro batch all of whose tokens count and whose labels are all in the vocabulary: the
    place of every True of a mask is every place, a truth value is False (no label is outside), a number is 1 (the loss is multiplied
    with nothing before backward), and no two numbers are the same (a micro batch has at most as many sequences as tokens).

    Products of low-precision operands into fp32 (`out_dtype`) exist for CUDA alone: `out` is returned as it is. So are a collective's
    outputs.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _on_meta(args, kwargs or {})
        # The modes over this one have seen the call; what shapes are made of need not pass through them.
        with torch._C.DisableTorchFunction():
            instead = _without_meta_kernel(func)
            result = func(*args, **kwargs) if instead is None else instead(func, *args, **kwargs)
            self.count([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_meta])
        return result


def _on_meta(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments with the meta device in place of another, for tensors that are made and for those that meet meta tensors."""
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": META}
    if kwargs.get("generator") is not None:
        kwargs = {**kwargs, "generator": None}  # of the CPU
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_meta = sum(tensor.is_meta for tensor in tensors)
    if 0 < on_meta < len(tensors):
        args, kwargs = tree_map_only(
            Tensor, lambda tensor: tensor if tensor.is_meta else tensor.to(META), (args, kwargs)
        )
    return args, kwargs


def _without_meta_kernel(func: Any) -> Callable[..., Any] | None:
    """What stands for an operation that has no meta kernel, None for all others."""
    if func.namespace == "c10d":
        return _communicated
    if func.overloadpacket in (_ATEN.mm, _ATEN.addmm) and "dtype" in func._overloadname:
        return lambda func, *args, out, **_: out
    return _STAND_FOR.get(func.overloadpacket)


def _communicated(func: Any, first: Any, *_: Any, **__: Any) -> Any:
    """A collective's outputs, which are its first argument, as they are; and a handle that has nothing to wait for."""
    work = FakeWork().boxed()
    return work if len(func._schema.returns) == 1 else (first, work)


def _every_place(func: Any, mask: Tensor, **_: Any) -> Tensor:
    return torch.empty(mask.numel(), mask.ndim, dtype=torch.int64, device=META)


def _all_different(func: Any, tensor: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (tensor.numel(),), tensor.shape, (tensor.numel(),)
    values, inverse, counts = (torch.empty(shape, dtype=torch.int64, device=META) for shape in shapes)
    return values.to(tensor.dtype), inverse, counts


def _no_surprise(func: Any, scalar: Tensor) -> Any:
    if scalar.is_meta:
        return False if scalar.dtype == torch.bool else 1
    return func(scalar)


_STAND_FOR: dict[Any, Callable[..., Any]] = {
    _ATEN.nonzero: _every_place,
    _ATEN._unique2: _all_different,
    _ATEN._local_scalar_dense: _no_surprise,
    _ATEN._assert_async: lambda func, *_: None,
    # has one, which takes as long as all else that building a model does
    _ATEN.normal_: lambda func, tensor, *_, **__: tensor,
}


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and 0 < p < 1 else x


class AsOnGpu(TorchFunctionMode):
    """Lets code that asks `tensor.is_cuda` take its GPU path: the losses choose their matrix products and block sizes by it.

    Dropout is the GPU's kernel, which keeps a mask of booleans; torch composes it of other operations elsewhere, which keep more.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _IS_CUDA:
            return True
        if func is functional.dropout:
            return _dropout(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        # Megatron's optimizers compare this text with "torch.cuda.BFloat16Tensor"
        return (
            result.replace("meta.", "") if func is torch.Tensor.type and isinstance(result, str) else result
        )
