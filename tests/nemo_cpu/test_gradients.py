"""Every parameter gradient of real NeMo training steps equals a single-process fp64 computation, at every layout.

The first step moves the policy away from the reference, so that the KL has a gradient; the second step's gradients are compared. They
leave the ranks as a distributed checkpoint and come back under Hugging Face names, as weights do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import RandomTokens
from models import make_model, oracle_gradients, read_hf, worst_error
from ranks import RankGroup

from asft_nemo.checkpoint.convert import export_hf
from asft_nemo.config.tables import OPTIONS
from asft_nemo.data import GlobalBatchSampler, Shuffled
from asft_nemo.objectives import objective

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

LENGTH, BATCH = 32, 8
VALID = [
    5,
    0,
    32,
    1,
    17,
    3,
    0,
    20,
]  # very unequal; with micro batches of one example, some have no valid token
BOUND = 1e-5  # of the largest gradient entry, fp32 against fp64

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel.tp_size": 2}),
    "pp2": (2, {"parallel.pp_size": 2}),
    "tp2_pp2": (4, {"parallel.tp_size": 2, "parallel.pp_size": 2}),
    "tp2_dp2": (4, {"parallel.tp_size": 2}),
    "pp2_vpp2": (2, {"parallel.pp_size": 2, "parallel.vpp_size": 2}),
    "tp2_pp2_sp": (4, {"parallel.tp_size": 2, "parallel.pp_size": 2, "parallel.sequence_parallel": True}),
    "tp2_pp2_vpp2_sp": (
        4,
        {
            "parallel.tp_size": 2,
            "parallel.pp_size": 2,
            "parallel.vpp_size": 2,
            "parallel.sequence_parallel": True,
        },
    ),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"objective.name": "sft"},
    "dft": {"objective.name": "dft"},
    "sft_kl": {"objective.name": "sft_kl", "objective.kl_weight": 0.5},
    "asft": {"objective.name": "asft", "objective.kl_weight": 0.5},
    "asft_reverse": {
        "objective.name": "asft",
        "objective.kl_weight": 0.5,
        "objective.kl_direction": "reverse",
    },
    "sft_kl_reverse": {
        "objective.name": "sft_kl",
        "objective.kl_weight": 0.5,
        "objective.kl_direction": "reverse",
    },
    "asft_sft": {"objective.name": "asft_sft", "objective.alpha": 0.3},
    "iw_sft": {"objective.name": "iw_sft", "objective.temperature": 2.0},
    "eaft": {"objective.name": "eaft", "objective.exponent": 0.5},
    # the second step still has the first step's snapshot, which is the base
    "psft": {"objective.name": "psft", "objective.refresh_every": 2},
}
# The default implementation at every layout and for every objective; the others at the corners.
CASES = [
    *((layout, "asft", "untied", "fused") for layout in LAYOUTS),
    *(("tp2_pp2", name, "untied", "fused") for name in OBJECTIVES if name != "asft"),
    ("tp2", "asft_reverse", "tied", "fused"),
    ("tp2_pp2_sp", "sft_kl", "tied", "fused"),
    ("pp2_vpp2", "sft_kl_reverse", "tied", "fused"),
    *((layout, "asft", "untied", "vocab_parallel") for layout in ("tp2_pp2", "tp2_dp2", "tp2_pp2_vpp2_sp")),
    ("tp2", "asft_reverse", "tied", "vocab_parallel"),
    ("tp2_pp2", "sft_kl", "tied", "vocab_parallel"),
    ("tp2_pp2", "dft", "untied", "vocab_parallel"),
    ("tp2_pp2", "asft", "untied", "dense"),
    ("tp2_pp2_vpp2_sp", "iw_sft", "untied", "fused"),
    ("tp2_pp2_vpp2_sp", "psft", "tied", "fused"),
    ("tp2_dp2", "iw_sft", "tied", "vocab_parallel"),
    ("tp2", "psft", "untied", "dense"),
    ("pp2", "iw_sft", "untied", "dense"),
    ("tp2_pp2_sp", "eaft", "tied", "vocab_parallel"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, tied=name == "tied") for name in ("tied", "untied")}


def chosen_objective(settings: dict[str, Any]) -> Any:
    return objective(
        settings["objective.name"],
        kl_weight=settings.get("objective.kl_weight", 0.0),
        kl_direction=settings.get("objective.kl_direction", "forward"),
        **{
            option: settings[f"objective.{option}"] for option in OPTIONS if f"objective.{option}" in settings
        },
    )


def second_batch(seed: int, data: RandomTokens) -> list[list[int]]:
    """Indices of the second global batch, one example each."""
    sampler = GlobalBatchSampler(
        Shuffled(len(data), seed=seed),
        consumed_samples=BATCH,
        micro_batch_size=1,
        global_batch_size=BATCH,
        dp_rank=0,
        dp_size=1,
    )
    batches = iter(sampler)
    return [next(batches) for _ in range(BATCH)]


def megatron_gradients(
    group: RankGroup, settings: dict[str, Any], model: Path, folder: Path
) -> tuple[dict[str, torch.Tensor], Path, float]:
    """Gradients of the second step under Hugging Face names, the policy they belong to, and the logged loss."""
    settings = {
        **settings,
        "model.path": str(model),
        "run.dir": str(folder / "run"),
        "run.world_size": group.world_size,
        "data.sequence_length": LENGTH,
        "trainer.global_batch_size": BATCH,
        "optim.lr": 3e-3,
        "optim.warmup_ratio": 0.0,
    }
    group.run("jobs:gradients", settings=settings, valid=VALID, out=str(folder / "gradients"))
    export_hf(folder / "gradients", folder / "gradients_hf")
    export_hf(folder / "run" / "checkpoints" / "step_1", folder / "policy")
    last = (folder / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    return read_hf(folder / "gradients_hf"), folder / "policy", json.loads(last)["loss"]


@pytest.mark.parametrize(("layout", "name", "weights", "loss"), CASES, ids=["-".join(case) for case in CASES])
def test_gradients_equal_the_oracle(
    layout: str,
    name: str,
    weights: str,
    loss: str,
    models: dict[str, Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    record_property: Any,
) -> None:
    world, parallel = LAYOUTS[layout]
    settings = {**OBJECTIVES[name], **parallel, "loss.implementation": loss}
    found, policy, value = megatron_gradients(
        request.getfixturevalue(f"ranks{world}"), settings, models[weights], tmp_path
    )
    data = RandomTokens(size=64, sequence_length=LENGTH, valid=VALID)
    chosen = chosen_objective(settings)
    expected, expected_loss = oracle_gradients(
        policy,
        chosen,
        second_batch(42, data),
        data,
        ref=models[weights] if chosen.needs_reference else None,
        old=models[weights] if chosen.needs_old_policy else None,
    )
    error, where = worst_error(found, expected)
    record_property("worst_relative_error", error)
    print(f"{layout} {name} {weights} {loss}: worst gradient error {error:.1e} of max |grad| ({where})")
    assert error <= BOUND, (error, where)
    assert value == pytest.approx(expected_loss, rel=1e-5)


def test_split_into_micro_batches_changes_nothing(
    ranks2: RankGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    """The same global batch in micro batches of 1, 2 and 4 examples, valid tokens 0 to 32 each: the same gradients."""
    found = {}
    for size in (1, 2, 4):
        settings = {**OBJECTIVES["asft"], "parallel.tp_size": 2, "trainer.micro_batch_size": size}
        found[size], _, _ = megatron_gradients(ranks2, settings, models["untied"], tmp_path / str(size))
    for size in (2, 4):
        error, where = worst_error(found[size], {name: value.double() for name, value in found[1].items()})
        assert error <= BOUND, (size, error, where)


def test_micro_batch_averaging_is_another_mean(
    ranks2: RankGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    """`loss.normalize_by=micro_batch` weighs micro batches, not tokens: with unequal counts the gradients differ."""
    settings = {**OBJECTIVES["asft"], "parallel.tp_size": 2}
    by_tokens, _, _ = megatron_gradients(ranks2, settings, models["untied"], tmp_path / "tokens")
    settings["loss.normalize_by"] = "micro_batch"
    by_batch, _, _ = megatron_gradients(ranks2, settings, models["untied"], tmp_path / "micro_batch")
    error, _ = worst_error(by_batch, {name: value.double() for name, value in by_tokens.items()})
    assert error > 100 * BOUND
