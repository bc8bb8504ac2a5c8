"""What is read from a trace: kernels go to the room that launched them, waiting is no work, transfers have kinds and bytes."""

from __future__ import annotations

from typing import Any

import pytest

from asft_nemo.profiling.breakdown import OTHER, PIPELINE, RING, Stay, Transfer, Work, breakdown
from asft_nemo.profiling.trace import STEP, operators, timeline

NCCL = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


def event(cat: str, name: str, ts: float, dur: float, tid: Any = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": args}


def on_gpu() -> list[dict[str, Any]]:
    """The host launches at once what the GPU does later; backward's kernel comes from autograd's thread."""
    return [
        {"ph": "M", "name": "process_name", "args": {}},
        event("user_annotation", STEP, 0, 100),
        event("user_annotation", "asft/forward", 0, 10),
        event("user_annotation", "asft/loss", 5, 4),
        event("user_annotation", "asft/backward", 20, 10),
        event("user_annotation", "megatron/forward-recv", 30, 10),
        event("user_annotation", "forward", 40, 10),  # of somebody else
        event("cuda_runtime", "cudaLaunchKernel", 1, 1, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 6, 1, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 22, 1, tid=2, correlation=3),
        event("cuda_runtime", "cudaLaunchKernel", 25, 1, tid=2, correlation=4),
        event("cuda_driver", "cuLaunchKernel", 60, 1, correlation=5),
        event("kernel", "gemm", 12, 8, tid=7, correlation=1),
        event("kernel", "gemm", 20, 10, tid=7, correlation=2),
        event("kernel", "gemm", 30, 20, tid=7, correlation=3),
        event(
            "kernel",
            NCCL,
            40,
            20,
            tid=8,
            correlation=4,
            **{"In msg nelems": 1000, "Out msg nelems": 1000, "dtype": "BFloat16"},
        ),
        event("gpu_memcpy", "Memcpy HtoD", 62, 3, tid=7, correlation=5),
    ]


def test_of_a_gpu() -> None:
    line = timeline(on_gpu())
    assert line.on_device
    assert (line.start, line.end) == (0, 100_000)
    assert [stay.room for stay in line.stays] == ["forward", "loss", "backward"]
    assert line.work == [
        Work(12_000, 20_000, "forward"),
        Work(20_000, 30_000, "loss"),
        Work(30_000, 50_000, "backward"),
        Work(62_000, 65_000, OTHER),
    ]
    assert line.transfers == [Transfer(40_000, 60_000, "all_reduce", 2000, "backward")]


def test_the_dearest_kernels() -> None:
    assert [(one.name, one.count) for one in operators(on_gpu())] == [
        ("gemm", 3),
        (NCCL, 1),
        ("Memcpy HtoD", 1),
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(...)", "reduce_scatter"),
        ("ncclDevKernel_AllGather_RING_LL(...)", "all_gather"),
        ("ncclDevKernel_SendRecv(...)", "send_recv"),
        ("ncclKernel_Broadcast_RING_LL_Sum_int8_t(...)", "broadcast"),
        ("ncclDevKernel_Reduce_Sum_f32_RING_LL(...)", "reduce"),
        ("void userbuffers_fp16_sum_inplace_gpu_rr_rs_oop<8>(...)", "userbuffers"),
        ("ncclDevKernel_Generic(...)", "other"),
    ],
)
def test_kernels_that_communicate(name: str, kind: str) -> None:
    events = [event("user_annotation", STEP, 0, 100), event("kernel", name, 10, 10, correlation=1)]
    assert [one.kind for one in timeline(events).transfers] == [kind]
    assert timeline(events).transfers[0].nbytes is None


@pytest.mark.parametrize(
    ("ranges", "kind", "part"),
    [
        (["asft/forward"], RING, ("forward", "communication")),
        (["asft/backward"], RING, ("backward", "communication")),
        (["asft/reference", "asft/frozen_model"], RING, ("reference", "communication")),
        (["asft/reference"], PIPELINE, ("reference", "wait")),
        (["megatron/forward-recv"], PIPELINE, (OTHER, "wait")),
        (["megatron/forward-backward", "megatron/forward-send-backward-recv"], PIPELINE, (OTHER, "wait")),
        ([], PIPELINE, (OTHER, "wait")),
    ],
)
def test_a_message_of_attention_is_communication_and_one_between_stages_a_wait(
    ranges: list[str], kind: str, part: tuple[str, str]
) -> None:
    """NCCL has the same kernel for both; it runs when the host is long elsewhere, and may be launched by autograd's thread."""
    events = [
        event("user_annotation", STEP, 0, 100),
        event("user_annotation", "asft/forward", 0, 5),
        *(event("user_annotation", name, 10 + place, 20 - 2 * place) for place, name in enumerate(ranges)),
        event("user_annotation", "asft/backward", 40, 30),
        event("cuda_runtime", "cudaLaunchKernelExC", 15, 1, tid=2, correlation=1),
        event("kernel", "ncclDevKernel_SendRecv(...)", 50, 10, tid=8, correlation=1),
    ]
    line = timeline(events)
    assert [one.kind for one in line.transfers] == [kind]
    found = breakdown(line)
    assert found.parts[part] == pytest.approx(10e-6)
    assert found.communication == pytest.approx(10e-6 if kind == RING else 0)


def test_of_a_cpu() -> None:
    """A collective's operator waits inside: neither it nor its callers are work meanwhile; other threads' operators are not the step's."""
    events = [
        event("user_annotation", STEP, 0, 100),
        event("user_annotation", "asft/forward", 10, 50),
        event("cpu_op", "aten::linear", 10, 10),
        event("cpu_op", "aten::addmm", 12, 6),
        event("cpu_op", "_Reduce", 20, 30),
        event("cpu_op", "c10d::allreduce_", 21, 2),
        event("cpu_op", "aten::add", 60, 5),
        event("cpu_op", "aten::sum", 15, 5, tid=9),
        event("user_annotation", "gloo:all_reduce", 22, 28, tid=9),
        event("user_annotation", "gloo:recv", 70, 10),
    ]
    line = timeline(events)
    assert not line.on_device
    assert line.work == [Work(12_000, 18_000), Work(60_000, 65_000)]
    assert line.transfers == [Transfer(22_000, 50_000, "all_reduce"), Transfer(70_000, 80_000, "send_recv")]
    assert line.stays == [Stay(10_000, 60_000, "forward")]
    own = {one.name: round(one.seconds * 1e6) for one in operators(events)}
    assert own == {
        "aten::linear": 4, "aten::addmm": 6, "_Reduce": 28, "c10d::allreduce_": 2, "aten::add": 5, "aten::sum": 5,
    }  # fmt: skip


def test_a_trace_without_the_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no range asft/step"):
        timeline([event("cpu_op", "aten::add", 0, 1)])
