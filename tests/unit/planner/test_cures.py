"""What the planner proposes where a run does not fit, what it tries in a search, and how it shares layers out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from asft_nemo.planner import balance, cures
from asft_nemo.planner.adapters import adapter_bytes
from asft_nemo.planner.gpus import GPUS
from asft_nemo.planner.memory import CHUNK_BYTES, has_second_model, loss_bytes, memory_of, vocabulary_rows
from asft_nemo.planner.plan import Plan, plan_of
from asft_nemo.planner.precision import widths_of
from asft_nemo.planner.published import published_spec
from asft_nemo.planner.search import search

SPEC = published_spec("Qwen/Qwen2.5-7B")
GPU = GPUS["h100-80gb"]


@pytest.fixture
def planned(settle) -> Any:
    """A plan of the 7B model on H100s."""

    def call(**changes: Any) -> Plan:
        return plan_of(settle(data__sequence_length=2048, precision="bf16", **changes), SPEC, GPU)

    return call


def test_every_proposal_fits_and_those_that_do_not_are_left_out(planned) -> None:
    tight = planned(parallel__tp_size=2, run__world_size=4, trainer__micro_batch_size=2)
    assert not tight.fits
    assert cures.cures(tight) == [
        "optim.distributed=true",
        "recompute.granularity=selective recompute.modules=[mlp]",
        "recompute.granularity=full",
        "parallel.sequence_parallel=true",
        "parallel.cp_size=2 run.world_size=8",
        "parallel.tp_size=4 run.world_size=8 parallel.sequence_parallel=true",
        "parallel.pp_size=2 run.world_size=8",
        "peft.name=lora",
        "--gpu h200",
    ]
    tighter = planned(parallel__tp_size=2, run__world_size=4, trainer__micro_batch_size=4)
    left = cures.cures(tighter, gpu_word="gpu=")
    assert "parallel.sequence_parallel=true" not in left
    assert "parallel.cp_size=4 run.world_size=16" in left, "twice as many do not suffice"
    assert left[-1] == "gpu=h200"


def test_sequence_parallelism_is_proposed_to_tensor_parallel_runs_alone(planned) -> None:
    def offered(plan: Plan) -> list[str]:
        return [key for group in cures._changes(plan) for settings in group for key in settings]

    assert "parallel.sequence_parallel" in [
        key
        for group in cures._changes(planned(parallel__tp_size=2))
        for settings in group
        for key in settings
        if len(settings) == 1
    ]
    assert "optim.distributed" in offered(planned())
    distributed = planned(
        parallel__tp_size=2, parallel__sequence_parallel=True, optim__distributed=True, run__world_size=4
    )
    assert "optim.distributed" not in offered(distributed)
    assert [{"parallel.sequence_parallel": True}] not in list(cures._changes(distributed))
    recomputing = planned(recompute__granularity="full")
    assert "recompute.granularity" not in offered(recomputing)


def test_a_change_that_breaks_a_rule_is_no_cure(planned) -> None:
    """7 tensor-parallel ranks cannot share 28 heads' 4 groups."""
    plan = planned(optim__distributed=True, run__world_size=8)
    assert cures.fits_with(plan, {"parallel.tp_size": 4, "run.world_size": 8})
    assert not cures.fits_with(plan, {"parallel.tp_size": 7, "run.world_size": 7})


def test_a_search_passes_over_what_does_not_divide_the_gpus(planned) -> None:
    """6 GPUs: context parallelism over 4 of them leaves 2 that nothing can use."""
    found = search(planned(run__world_size=6, trainer__global_batch_size=48, optim__distributed=True))
    sizes = {
        (run.parallel.tp_size, run.parallel.cp_size, run.parallel.pp_size)
        for one in found
        if one.plan is not None
        for run in [one.plan.run]
    }
    assert sizes
    assert all(6 % (tp * cp * pp) == 0 for tp, cp, pp in sizes)


def test_without_pipeline_stages_there_is_nothing_to_share_out(planned) -> None:
    plan = planned()
    assert balance.best_share(plan) is None
    assert balance.explain(plan) == []


def test_a_share_that_cannot_be_made_is_not_proposed(planned) -> None:
    """One layer over two stages: Megatron takes no share of it."""
    one_layer = dataclasses.replace(SPEC, num_layers=1)
    plan = plan_of(
        planned(parallel__pp_size=2, run__world_size=2).run, dataclasses.replace(one_layer, num_layers=2), GPU
    )
    few = dataclasses.replace(plan, spec=one_layer)
    assert balance.best_share(few) is None
    assert len(balance.explain(few)) == 1


@pytest.mark.parametrize(
    ("changes", "second"),
    [
        ({"objective__name": "psft"}, True),  # its snapshot
        ({"objective__name": "asft", "reference__form": "cached", "reference__fill": "first_epoch"}, True),
        ({"objective__name": "asft", "reference__form": "cached"}, False),
        ({"objective__name": "asft", "reference__form": "offloaded"}, True),
        ({"objective__name": "sft"}, False),
    ],
)
def test_where_the_frozen_weights_are(settle, changes: dict[str, Any], second: bool) -> None:
    run = settle(**changes)
    assert has_second_model(run) is second
    (stage,) = memory_of(run, SPEC, widths_of(run))
    held_whole = stage.reference == stage.weights
    assert held_whole == (second and run.reference.form != "offloaded")


def test_losses_of_logits_hold_whole_logits(settle) -> None:
    """Megatron's logits of both models and a gradient, in the compute dtype; `dense` gathers the vocabulary and copies it in fp32."""
    common = {
        "objective__name": "asft",
        "reference__form": "resident",
        "parallel__tp_size": 2,
        "run__world_size": 2,
        "precision": "bf16",
    }
    sharded = settle(**common, loss__implementation="vocab_parallel")
    whole = settle(**common, loss__implementation="dense")
    widths, tokens = widths_of(sharded), sharded.data.sequence_length * sharded.trainer.micro_batch_size
    rows = vocabulary_rows(sharded, SPEC)
    assert loss_bytes(sharded, SPEC, widths) == tokens * rows * 3 * 2 + CHUNK_BYTES
    assert loss_bytes(whole, SPEC, widths) == tokens * rows * 2 * (3 * 2 + 12) + CHUNK_BYTES


def test_adapters_without_dropout_keep_no_mask(settle) -> None:
    """With Transformer Engine's attention the input of the projection is kept by the attention itself."""
    lora = {"peft__name": "lora", "peft__rank": 8, "precision": "bf16"}
    run, dropped = settle(**lora, peft__dropout=0.0), settle(**lora, peft__dropout=0.1)
    tokens = run.data.sequence_length * run.trainer.micro_batch_size
    for kernels in ("te", "local"):
        widths = dataclasses.replace(widths_of(run), kernels=kernels)
        kept, masked = adapter_bytes(run, SPEC, widths), adapter_bytes(dropped, SPEC, widths)
        width = SPEC.num_attention_heads * SPEC.head_dim
        own = 0 if kernels == "te" else tokens * width * 2
        assert kept["linear_proj"] == tokens * 8 * 2 + own
        assert masked["linear_proj"] == tokens * 8 * 2 + tokens * width * 3
