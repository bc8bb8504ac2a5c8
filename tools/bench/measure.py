"""Measurements made inside a worker process: seconds, bytes, and how right the gradients are.

Seconds of all contenders come from one process, their rounds interleaved, so that what disturbs the machine
disturbs all of them and per-round ratios hold. Bytes come from one process per contender.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.contenders import (
    CONTENDERS,
    Case,
    Contender,
    Loss,
    Tensors,
    Unavailable,
    authors,
    fused_chunk_tokens,
    make_tensors,
)

WARM_UP = {"tokens": 64, "vocab": 256, "hidden": 64}
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _forward_backward(loss: Loss, tensors: Tensors) -> float:
    """One visit; gradients of an earlier one are dropped first."""
    tensors.hidden_TH.grad = tensors.head_VH.grad = None
    value = loss(tensors)
    value.backward()
    return float(value.detach())


def _build(contender: Contender, case: Case) -> Loss:
    computed = contender.computes(case.objective)
    if computed is None:
        raise Unavailable(f"offers nothing like objective {case.objective}")
    return contender.build(replace(case, objective=computed))


def _built(case: Case, names: list[str]) -> tuple[dict[str, Loss], dict[str, str]]:
    """The losses that can run here, and for the others why not."""
    losses: dict[str, Loss] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            losses[name] = _build(CONTENDERS[name], case)
        except Unavailable as error:
            skipped[name] = str(error)
    return losses, skipped


def _seconds(loss: Loss, tensors: Tensors, device: str) -> tuple[float, float]:
    """By the clock, and of all this process's threads together."""
    if device == "cuda":
        torch.cuda.synchronize()
    started, started_cpu = time.perf_counter(), time.process_time()
    _forward_backward(loss, tensors)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - started_cpu


def time_rounds(case: Case, names: list[str], repeats: int) -> dict[str, Any]:
    """Seconds of forward + backward: one warm-up round, then `repeats` rounds, every contender once in each.

    The order rotates by one from round to round, so that none always follows the same neighbour.

    Returns:
        `seconds`: name -> one number a round; `cpu_seconds`: the same, of all threads together, which on a CPU
        falls short of seconds times threads where other processes took the cores; `skipped`: name -> reason.
    """
    losses, skipped = _built(case, names)
    tensors = make_tensors(case)
    order = list(losses)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in order}
    for number in range(repeats + 1):
        for name in order:
            elapsed, elapsed_cpu = _seconds(losses[name], tensors, case.device)
            if number:
                seconds[name].append(elapsed)
                cpu_seconds[name].append(elapsed_cpu)
        order = order[1:] + order[:1]
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "skipped": skipped}


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")


def _trim() -> None:
    """Hands free memory back to the system, so that the mark starts from what is in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def _peak_bytes(device: str) -> Iterator[dict[str, Any]]:
    """Fills in `bytes`, the high-water mark above what was held at entry, and `method`."""
    result: dict[str, Any] = {}
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield result
        torch.cuda.synchronize()
        result.update(
            bytes=torch.cuda.max_memory_allocated() - before, method="torch.cuda.max_memory_allocated"
        )
        return
    _trim()
    try:
        _CLEAR.write_text("5", encoding="ascii")  # VmHWM starts anew from the present size
    except OSError:
        before = _status_bytes("VmRSS")
        yield result
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        result.update(bytes=max(peak - before, 0), method="ru_maxrss of the process, minus VmRSS before")
        return
    before, mapped = _status_bytes("VmRSS"), _status_bytes("RssFile")
    yield result
    result.update(bytes=_status_bytes("VmHWM") - before, method="VmHWM, reset before, minus VmRSS before")
    # Pages of program files that came or went in between: the error of the mark, of whatever sign.
    result["file_bytes_change"] = _status_bytes("RssFile") - mapped


def peak_memory(case: Case, name: str) -> dict[str, Any]:
    """Peak extra memory of one forward + backward, for a process of its own.

    Libraries are loaded and warmed up at a tiny size first. What is counted beyond the given tensors: logits,
    temporaries, packing buffers of the GEMMs, and both gradients, which every contender leaves behind.
    """
    try:
        loss = _build(CONTENDERS[name], case)
        tiny = replace(case, **WARM_UP)
        _forward_backward(_build(CONTENDERS[name], tiny), make_tensors(tiny))
    except Unavailable as error:
        return {"skipped": str(error)}
    tensors = make_tensors(case)
    given = sum(tensor.nbytes for tensor in vars(tensors).values())
    with _peak_bytes(case.device) as result:
        _forward_backward(loss, tensors)
    return {**result, "given_bytes": given}


def gradient_errors(case: Case, names: list[str]) -> dict[str, dict[str, Any]]:
    """||g - g64|| / ||g64|| of dHidden and dHead, against (a) in fp64 on the same rounded tensors.

    Shows that what is timed is the same loss. The size is small: 64 tokens, 256 rows, hidden size 64.
    """
    small = replace(case, **WARM_UP)
    losses, _ = _built(small, names)
    tensors = make_tensors(small)
    errors: dict[str, dict[str, Any]] = {}
    for name, loss in losses.items():
        computed = CONTENDERS[name].computes(small.objective)
        assert computed is not None
        exact = Tensors(
            *(
                t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
                for t in vars(tensors).values()
            )
        )
        _forward_backward(authors(replace(small, objective=computed, dtype="fp64")), exact)
        _forward_backward(loss, tensors)
        errors[name] = {"objective": computed}
        for what in ("hidden_TH", "head_VH"):
            expected, found = getattr(exact, what).grad, getattr(tensors, what).grad
            errors[name]["d" + what] = float((found.double() - expected).norm() / expected.norm())
    return errors


def work(request: dict[str, Any]) -> dict[str, Any]:
    """What a worker process is asked for: `kind` time, memory or errors."""
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    case, names = Case(**request["case"]), request["names"]
    if request["kind"] == "memory":
        return peak_memory(case, names[0])
    if request["kind"] == "errors":
        about = {
            "threads": torch.get_num_threads(),
            "chunk_tokens": fused_chunk_tokens(case),
            **_device(case),
        }
        return {"gradient_errors": gradient_errors(case, names), **about}
    return time_rounds(case, names, request["repeats"])


def _device(case: Case) -> dict[str, Any]:
    if case.device != "cuda":
        return {}
    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
