"""A real step's gradients under Hugging Face names, and what they must equal: the same examples in fp64 on one process.

The first step moves the policy away from the reference, so that the KL has a gradient; the second step's gradients are compared. They
leave the ranks as a distributed checkpoint and come back under Hugging Face names, as weights do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jobs import RandomTokens
from models import oracle_gradients, read_hf, worst_error
from ranks import RankGroup
from torch import Tensor

from asft_nemo.checkpoint.convert import export_hf
from asft_nemo.config.tables import OPTIONS
from asft_nemo.data import GlobalBatchSampler, Shuffled
from asft_nemo.objectives import Objective, objective

LENGTH, BATCH, SEED = 32, 8, 42
# very unequal; with micro batches of one example, some have no valid token
VALID = [5, 0, 32, 1, 17, 3, 0, 20]
BOUND = 1e-5  # of the largest gradient entry, fp32 against fp64

_TP2, _PP2 = {"parallel.tp_size": 2}, {"parallel.pp_size": 2}
_VPP2, _SP = {**_PP2, "parallel.vpp_size": 2}, {"parallel.sequence_parallel": True}
#: name -> (ranks, settings); data-parallel ranks are what the layout leaves over
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, _TP2),
    "pp2": (2, _PP2),
    "tp2_pp2": (4, {**_TP2, **_PP2}),
    "tp2_dp2": (4, _TP2),
    "pp2_vpp2": (2, _VPP2),
    "tp2_pp2_sp": (4, {**_TP2, **_PP2, **_SP}),
    "tp2_pp2_vpp2_sp": (4, {**_TP2, **_VPP2, **_SP}),
}
_REVERSE = {"objective.kl_weight": 0.5, "objective.kl_direction": "reverse"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"objective.name": "sft"},
    "dft": {"objective.name": "dft"},
    "sft_kl": {"objective.name": "sft_kl", "objective.kl_weight": 0.5},
    "asft": {"objective.name": "asft", "objective.kl_weight": 0.5},
    "asft_reverse": {"objective.name": "asft", **_REVERSE},
    "sft_kl_reverse": {"objective.name": "sft_kl", **_REVERSE},
    "asft_sft": {"objective.name": "asft_sft", "objective.alpha": 0.3},
    "iw_sft": {"objective.name": "iw_sft", "objective.temperature": 2.0},
    "eaft": {"objective.name": "eaft", "objective.exponent": 0.5},
    # the second step still has the first step's snapshot, which is the base
    "psft": {"objective.name": "psft", "objective.refresh_every": 2},
}


@dataclass(frozen=True)
class Step:
    """The second step of a real run.

    Attributes:
        gradients: of every parameter, under its Hugging Face name.
        policy: Hugging Face directory of the weights they belong to.
        loss: as metrics.jsonl has it.
        answers: what the job returned, by rank.
    """

    gradients: dict[str, Tensor]
    policy: Path
    loss: float
    answers: list[Any]


def random_tokens() -> RandomTokens:
    """The examples that `jobs.fit` trains on where nothing else is asked."""
    return RandomTokens(size=64, sequence_length=LENGTH, valid=VALID)


def second_batch(data: Any) -> list[list[int]]:
    """Indices of the second global batch, one a list."""
    sampler = GlobalBatchSampler(
        Shuffled(len(data), seed=SEED),
        consumed_samples=BATCH,
        micro_batch_size=1,
        global_batch_size=BATCH,
        dp_rank=0,
        dp_size=1,
    )
    batches = iter(sampler)
    return [next(batches) for _ in range(BATCH)]


def chosen_objective(settings: dict[str, Any]) -> Objective:
    """The objective that a run with these settings has."""
    options = {name: settings[key] for name in OPTIONS if (key := f"objective.{name}") in settings}
    return objective(
        settings["objective.name"],
        kl_weight=settings.get("objective.kl_weight", 0.0),
        kl_direction=settings.get("objective.kl_direction", "forward"),
        **options,
    )


def step_settings(group: RankGroup, model: Path, run_dir: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` over those that all of these runs share."""
    return {
        "model.path": str(model),
        "run.dir": str(run_dir),
        "run.world_size": group.world_size,
        "data.sequence_length": LENGTH,
        "trainer.global_batch_size": BATCH,
        "optim.lr": 3e-3,
        "optim.warmup_ratio": 0.0,
        **settings,
    }


def megatron_step(
    group: RankGroup, settings: dict[str, Any], model: Path, folder: Path, *, job: str = "jobs:gradients"
) -> Step:
    """Runs two steps on real ranks; `job` takes `jobs.gradients`'s arguments."""
    asked = step_settings(group, model, folder / "run", settings)
    answers = group.run(job, settings=asked, valid=VALID, out=str(folder / "gradients"))
    export_hf(folder / "gradients", folder / "gradients_hf")
    export_hf(folder / "run" / "checkpoints" / "step_1", folder / "policy")
    last = (folder / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    return Step(read_hf(folder / "gradients_hf"), folder / "policy", json.loads(last)["loss"], list(answers))


def fp64_gradients(
    step: Step,
    settings: dict[str, Any],
    model: Path,
    *,
    data: Any = None,
    batches: list[list[int]] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """What the step's gradients and its loss must be.

    Args:
        step: tells the policy.
        settings: of the run; they name the objective.
        model: the base: reference and first snapshot.
        data: single examples; random ones where not given.
        batches: indices of the step's examples; the second batch of a shuffled epoch where not given.
    """
    chosen, data = chosen_objective(settings), random_tokens() if data is None else data
    return oracle_gradients(
        step.policy,
        chosen,
        second_batch(data) if batches is None else batches,
        data,
        ref=model if chosen.needs_reference else None,
        old=model if chosen.needs_old_policy else None,
    )


def assert_equal(step: Step, expected: tuple[dict[str, Tensor], float], *, label: str) -> float:
    """The step's gradients are within `BOUND` of the expected ones and its loss within 1e-5; returns the worst error."""
    gradients, loss = expected
    error, where = worst_error(step.gradients, gradients)
    print(f"{label}: worst gradient error {error:.1e} of max |grad| ({where})")
    assert error <= BOUND, (error, where)
    assert step.loss == pytest.approx(loss, rel=1e-5)
    return error


def check_step(
    group: RankGroup, settings: dict[str, Any], model: Path, folder: Path, *, label: str, **examples: Any
) -> float:
    """Two real steps, and the second one's gradients against fp64; `examples` are `fp64_gradients`'s. Returns the worst error."""
    step = megatron_step(group, settings, model, folder)
    return assert_equal(step, fp64_gradients(step, settings, model, **examples), label=label)
