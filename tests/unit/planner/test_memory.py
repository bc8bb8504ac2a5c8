"""Bytes: the formulas' properties, schedules against a count by hand, and agreement with what was counted tensor by tensor."""

from __future__ import annotations

import math
from typing import Any

import pytest

from asft_nemo.config.schema import RunConfig
from asft_nemo.planner.activations import most_in_flight
from asft_nemo.planner.memory import CHUNK_BYTES, StageMemory, _auto_chunk, loss_bytes, memory_of
from asft_nemo.planner.precision import WIDTHS, widths_of
from asft_nemo.planner.published import published_spec

SPEC = published_spec("Qwen/Qwen2.5-72B")
LAYOUT: dict[str, Any] = {
    "parallel__tp_size": 8,
    "parallel__pp_size": 4,
    "parallel__vpp_size": 5,
    "parallel__sequence_parallel": True,
    "data__sequence_length": 4096,
    "optim__distributed": True,
}


def stages(run: RunConfig) -> tuple[StageMemory, ...]:
    return memory_of(run, SPEC, widths_of(run))


def test_72b_as_counted_without_data(settle) -> None:
    """Figures of `asft_nemo.nemo.simulate` for recipe=qwen25_72b objective=asft data.sequence_length=4096, ranks 0 and 24."""
    first, *_, last = stages(settle(**LAYOUT, objective__name="asft", reference__form="resident"))
    held = (first.weights, first.gradients, first.optimizer, first.reference, first.in_flight)
    assert held == (4_701_472_768, 9_402_945_536, 28_208_836_608, 4_701_472_768, 23)
    assert (last.weights, last.reference_hidden, last.in_flight) == (4_701_489_152, 536_870_912, 17)
    assert first.activations == pytest.approx(13_192_806_446, rel=1e-3)
    assert last.activations == pytest.approx(9_767_880_764, rel=1e-3)
    assert first.peak == pytest.approx(60_453_556_270, rel=0.02)
    assert last.peak == pytest.approx(58_032_749_154, rel=0.02)


@pytest.mark.parametrize(
    ("stages_of_rank", "pp_size", "rank", "micro_batches", "most"),
    [
        (1, 1, 0, 8, 1),
        (1, 4, 0, 8, 4),
        (1, 4, 3, 8, 1),
        (1, 4, 0, 2, 2),  # fewer micro batches than stages
        (5, 4, 0, 8, 2 * 3 + 4 * 4 + 1),
        (5, 4, 3, 8, 4 * 4 + 1),
    ],
)
def test_passes_in_flight(
    stages_of_rank: int, pp_size: int, rank: int, micro_batches: int, most: int
) -> None:
    found = most_in_flight([1] * stages_of_rank, pp_size=pp_size, rank=rank, micro_batches=micro_batches)
    assert found == most


def test_chunks_of_unequal_size_are_counted_as_the_schedule_runs_them() -> None:
    # PP2, two chunks of 3 and 1, rank 0, four micro batches. Forward: A0 A1 B0 B1 A2 A3 B2 B3; from the fifth on one backward after each,
    # of B first. The most is after the sixth forward pass: A0 A1 A2 A3 and B1, B0 being gone.
    assert most_in_flight([3, 1], pp_size=2, rank=0, micro_batches=4) == 4 * 3 + 1


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"parallel__tp_size": 8}, {"parallel__tp_size": 4}),
        ({"parallel__sequence_parallel": True}, {"parallel__sequence_parallel": False}),
        ({"parallel__cp_size": 2}, {"parallel__cp_size": 1}),
        ({"recompute__granularity": "full"}, {"recompute__granularity": "selective"}),
        ({"recompute__granularity": "selective"}, {"recompute__granularity": "none"}),
        ({"recompute__granularity": "full", "recompute__method": "block", "recompute__num_layers": 3}, {}),
        ({"data__sequence_length": 4096}, {"data__sequence_length": 8192}),
        ({"trainer__micro_batch_size": 1}, {"trainer__micro_batch_size": 2}),
        ({}, {"kernels__layers": "local"}),
    ],
    ids=str,
)
def test_activations_grow_with(settle, less: dict[str, Any], more: dict[str, Any]) -> None:
    small, large = (stages(settle(**(LAYOUT | changes))) for changes in (less, more))
    for a, b in zip(small, large, strict=True):
        assert a.activations < b.activations
        assert a.peak < b.peak


def test_what_the_reference_costs(settle) -> None:
    runs = {
        form: stages(settle(**LAYOUT, objective__name="asft", reference__form=form))
        for form in ("resident", "offloaded", "cached")
    }
    without = stages(settle(**LAYOUT))
    for rank, plain in enumerate(without):
        resident, offloaded, cached = (runs[form][rank] for form in ("resident", "offloaded", "cached"))
        assert resident.reference == resident.weights
        head = 2 * resident.parameters.head
        assert offloaded.reference == cached.reference == head
        assert offloaded.prepass == resident.weights - head
        assert offloaded.reference_host == resident.weights - head
        assert resident.reference_host == cached.reference_host == 0
        # a second model has tables of its own
        assert resident.buffers == offloaded.buffers == 2 * plain.buffers == 2 * cached.buffers
        # its weights leave before activations grow: at the peak nothing of them is there
        assert offloaded.peak - offloaded.buffers == cached.peak - cached.buffers
        assert resident.lasting - plain.lasting == resident.weights + plain.buffers


def test_an_offloaded_reference_of_an_fp8_policy_waits_in_bf16(settle) -> None:
    """Its copies in FP8 are made of the weights when they have come."""
    fp8, bf16 = (
        stages(settle(**LAYOUT, objective__name="asft", reference__form="offloaded", precision=precision))
        for precision in ("fp8_current", "bf16")
    )
    for ours, wide in zip(fp8, bf16, strict=True):
        assert ours.reference_host == wide.reference_host > 0
        copies = ours.prepass - wide.prepass  # of all but the edge layers
        assert 0.9 * ours.parameters.linear < copies <= ours.parameters.linear


def test_pinned_gradients_of_offloaded_state_are_powers_of_two(settle) -> None:
    """Qwen2.5-1.5B in one piece, tensor by tensor: a layer's seven and two norms' worth, the tied embedding, the last norm."""
    run = settle(optim__distributed=True, optim__cpu_offload=1.0, precision="bf16")
    spec = published_spec("Qwen/Qwen2.5-1.5B")
    [stage] = memory_of(run, spec, widths_of(run))
    layer = [2048 * 1536, 2048, 1536 * 1536, 17_920 * 1536, 8960 * 1536, 1536, 1536]
    tensors = [*layer * 28, 151_936 * 1536, 1536]
    assert sum(tensors) == stage.parameters.total
    pinned = sum(2 ** math.ceil(math.log2(4 * numbers)) for numbers in tensors)
    assert stage.optimizer_host == 12 * sum(tensors) + pinned
    assert pinned > 1.1 * 4 * sum(tensors)


def test_data_parallel_ranks_share_offloaded_state(settle) -> None:
    changes = LAYOUT | {"optim__cpu_offload": 0.5}
    one, two = (stages(settle(**changes, run__world_size=32 * dp))[1] for dp in (1, 2))
    assert one.optimizer_host == pytest.approx(2 * two.optimizer_host, abs=2)
    assert 16 < one.optimizer_host / (0.5 * one.parameters.total) < 20


def test_attention_that_keeps_its_scores_takes_them_once_more_for_all_layers_and_several_times_in_backward(
    settle,
) -> None:
    run = settle(**LAYOUT, kernels__layers="local")
    flash, local = stages(settle(**LAYOUT))[1], stages(run)[1]
    scores = 2 * 4096 * 4096 * SPEC.num_attention_heads // 8
    assert local.buffers - flash.buffers == scores + 4096 * 4096
    assert 2 * scores < local.working < 4 * scores


def test_adapters_leave_weights_and_activations(settle) -> None:
    full, adapted = (stages(settle(**LAYOUT, peft__name=name))[0] for name in ("none", "lora"))
    assert adapted.gradients == 4 * adapted.parameters.adapters < full.gradients / 100
    assert adapted.optimizer == 12 * adapted.parameters.adapters


def test_context_parallel_ranks_share_the_optimizer(settle) -> None:
    one, two = (stages(settle(**(LAYOUT | {"parallel__cp_size": size})))[1] for size in (1, 2))
    assert one.optimizer == 2 * two.optimizer
    assert one.gradients == two.gradients


def test_loss_chunks_are_those_of_the_losses() -> None:
    import torch

    from asft_nemo.losses import VocabShard, chunks
    from asft_nemo.objectives import Objective

    assert chunks.CUDA_CHUNK_BYTES == CHUNK_BYTES
    for rows in (100, 19_008, 76_032, 152_064, 10**8):
        shard = VocabShard.full(rows)
        chosen, device = Objective("asft"), torch.device("cuda")
        a_token = chunks.bytes_per_token(chosen, shard, torch.float32)
        found = chunks.resolve_chunk_tokens(
            "auto",
            num_tokens=2**40,
            objective=chosen,
            shard=shard,
            dtype=torch.float32,
            device=device,
            visits_head=True,
        )
        assert found == _auto_chunk(a_token)


@pytest.mark.parametrize("length", [8192, 32768])
def test_the_loss_takes_its_chunk_and_what_grows_with_hidden_states_alone(settle, length: int) -> None:
    run = settle(**(LAYOUT | {"data__sequence_length": length}))
    buffers = loss_bytes(run, SPEC, WIDTHS["bf16"]) - length * SPEC.hidden_size * (4 + 2)
    assert CHUNK_BYTES / 2 < buffers <= CHUNK_BYTES
