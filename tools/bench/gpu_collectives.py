"""What the ranks do to check their links: collectives with known results, timed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from bench.gpu_clock import seconds_of
from bench.gpu_rank import at

MIB = 2**20
# Bytes on the busiest link for each byte of the result, with n ranks: what nccl-tests call the bus bandwidth.
_BUS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "send_receive": lambda n: 1.0,
}


def start(device: str) -> torch.device:
    """Joins the other ranks in the default group; this rank's device."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        at("meeting the other ranks")
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device("cpu")


@dataclass(frozen=True)
class _Operation:
    """One collective on tensors of its own.

    Attributes:
        call: does it.
        given: is filled with `value` ahead of the call whose result is looked at.
        value: this rank's.
        result: is spoilt before that, where it is another tensor than `given`.
        expected: of `result`; broadcasts.
    """

    call: Callable[[], Any]
    given: Tensor
    value: float
    result: Tensor
    expected: Tensor

    def right(self) -> bool:
        """Whether a call leaves what it should."""
        self.result.fill_(float("nan"))
        self.given.fill_(self.value)
        self.call()
        return bool((self.result == self.expected).all())


def _all_reduce(size: int, where: torch.device) -> _Operation:
    rank, world = dist.get_rank(), dist.get_world_size()
    buffer = torch.zeros(size, device=where)
    total = torch.tensor(world * (world + 1) / 2, device=where)
    return _Operation(lambda: dist.all_reduce(buffer), buffer, rank + 1.0, buffer, total)


def _all_gather(size: int, where: torch.device) -> _Operation:
    rank, world = dist.get_rank(), dist.get_world_size()
    part, whole = torch.zeros(size // world, device=where), torch.empty(size // world * world, device=where)
    owners = torch.arange(1.0, world + 1, device=where).repeat_interleave(size // world)
    return _Operation(lambda: dist.all_gather_into_tensor(whole, part), part, rank + 1.0, whole, owners)


def _reduce_scatter(size: int, where: torch.device) -> _Operation:
    rank, world = dist.get_rank(), dist.get_world_size()
    whole, part = torch.zeros(size // world * world, device=where), torch.empty(size // world, device=where)
    total = torch.tensor(world * (world + 1) / 2, device=where)
    return _Operation(lambda: dist.reduce_scatter_tensor(part, whole), whole, rank + 1.0, part, total)


def _send_receive(size: int, where: torch.device) -> _Operation:
    """Around a ring, all at once, as pipeline stages and context-parallel attention do."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine, theirs = torch.zeros(size, device=where), torch.empty(size, device=where)

    def call() -> None:
        both = [
            dist.P2POp(dist.isend, mine, (rank + 1) % world),
            dist.P2POp(dist.irecv, theirs, (rank - 1) % world),
        ]
        for request in dist.batch_isend_irecv(both):
            request.wait()

    return _Operation(call, mine, rank + 1.0, theirs, torch.tensor((rank - 1) % world + 1.0, device=where))


_OPERATIONS = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "send_receive": _send_receive,
}


def collectives(sizes: list[int], repeats: int, device: str) -> list[dict[str, Any]]:
    """Every operation at every size, in fp32: whether this rank's result is right, and GB a second over its busiest link.

    Args:
        sizes: MiB of the whole tensor.
        repeats: timed calls, after two that are not.
        device: "cuda" or "cpu".
    """
    where = start(device)
    found = []
    for name, make in _OPERATIONS.items():
        for mib in sizes:
            at(f"{name} of {mib} MiB")
            operation = make(mib * MIB // 4, where)
            for _ in range(2):
                operation.call()
            seconds = statistics.median(seconds_of(operation.call, device) for _ in range(repeats))
            right = operation.right()
            moved = mib * MIB * _BUS[name](dist.get_world_size())
            found.append(
                {"operation": name, "mib": mib, "right": right, "gb_per_second": moved / seconds / 1e9}
            )
    at("the end")
    dist.barrier()
    return found


def stall(rank: int, device: str) -> None:
    """For the test of a hang: one rank never comes to the others' all-reduce."""
    where = start(device)
    if dist.get_rank() == rank:
        at("a sleep")
        time.sleep(3600)
    at("the first all-reduce")
    at("the second all-reduce")
    dist.all_reduce(torch.ones(1, device=where))
