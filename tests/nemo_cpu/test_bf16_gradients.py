"""Gradients of real bf16 training steps are as close to fp64 as those of plain PyTorch in bf16 (docs/memory_and_speed.md has the numbers).

The same rounded weights and examples everywhere, so that what differs is the arithmetic alone. A sample is a step of a run: its policy,
left as a checkpoint, and its global batch. The error is the length of the difference to fp64 over the length of the gradient, all tensors
together; samples differ by a factor of two in it, so ours is divided by plain PyTorch's of the same sample, and means of that are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from gradients import BATCH, LAYOUTS, LENGTH, OBJECTIVES, SEED, chosen_objective, step_settings
from jobs import RandomTokens
from models import oracle_gradients, read_hf
from plain_bf16 import Squares, plain_gradients, relative, rounded_model, squares
from ranks import RankGroup

from asft_nemo.checkpoint.convert import export_hf
from asft_nemo.data import GlobalBatchSampler, Shuffled

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

SETTINGS = {**OBJECTIVES["asft"], "precision": "bf16"}
VALID = [32, 29, 30, 31, 32, 25, 32, 28]
DATA = RandomTokens(size=128, sequence_length=LENGTH, valid=VALID)

#: name of a computation -> one `Squares` a sample
Errors = dict[str, list[Squares]]


def nth_batch(number: int) -> list[list[int]]:
    """Indices of the global batch of step `number`, counted from 1, one a list."""
    sampler = GlobalBatchSampler(
        Shuffled(len(DATA), seed=SEED),
        consumed_samples=(number - 1) * BATCH,
        micro_batch_size=1,
        global_batch_size=BATCH,
        dp_rank=0,
        dp_size=1,
    )
    batches: Iterator[list[int]] = iter(sampler)
    return [next(batches) for _ in range(BATCH)]


def errors_of_run(
    group: RankGroup, layout: str, folder: Path, *, seed: int, steps: int, megatrons_bias: bool = False
) -> Errors:
    """One run of `steps` steps; samples are all but the first, at which policy and reference are equal."""
    model = rounded_model(folder / "model", seed=seed)
    settings: dict[str, Any] = {**SETTINGS, **LAYOUTS[layout][1], "trainer.max_steps": steps}
    group.run(
        "bf16_jobs:gradients_of_steps",
        settings=step_settings(group, model, folder / "run", settings),
        valid=VALID,
        out=str(folder / "gradients"),
        size=len(DATA),
        megatrons_bias=megatrons_bias,
    )
    found: Errors = {"ours": [], "plain": [], "split": []}
    for number in range(2, steps + 1):
        policy, gradients = folder / f"policy_{number}", folder / f"gradients_{number}"
        export_hf(folder / "run" / "checkpoints" / f"step_{number - 1}", policy)
        export_hf(folder / "gradients" / f"step_{number}", gradients)
        weights = read_hf(policy).values()
        assert all(
            bool((weight.bfloat16() == weight).all()) for weight in weights
        )  # the model's, not the masters
        batch, objective = nth_batch(number), chosen_objective(settings)
        exact, _ = oracle_gradients(policy, objective, batch, DATA, ref=model)
        found["ours"].append(squares(read_hf(gradients), exact))
        items = [DATA[index] for indices in batch for index in indices]
        for name in ("plain", "split"):
            plain = plain_gradients(policy, model, items, objective, split=name == "split")
            found[name].append(squares(plain, exact))
    return found


def ratio(errors: Errors, other: str) -> float:
    """Mean over samples of our error over the other's; prints it with its standard error."""
    ratios = [
        relative(ours) / relative(theirs) for ours, theirs in zip(errors["ours"], errors[other], strict=True)
    ]
    average, spread = mean(ratios), stdev(ratios) / len(ratios) ** 0.5
    print(
        f"ours / {other}: {average:.3f} +- {spread:.3f} over {len(ratios)} samples, largest {max(ratios):.3f}"
    )
    return average


def worst_kind(errors: Errors, other: str) -> tuple[float, str]:
    """The same for all layers' and samples' tensors of one kind together, for the kind where it is largest."""

    def of_kind(samples: list[Squares], kind: str) -> float:
        together = {
            f"{number} {name}": pair
            for number, sample in enumerate(samples)
            for name, pair in sample.items()
            if name.endswith(kind)
        }
        return relative(together)

    kinds = {".".join(name.split(".")[-3:]).lstrip("0123456789.") for name in errors["ours"][0]}
    return max((of_kind(errors["ours"], kind) / of_kind(errors[other], kind), kind) for kind in kinds)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_error_that_is_not_finite_is_within_no_bound(value: float) -> None:
    """Ours or the other's: ours over an infinite error would be 0."""
    ours, theirs = (
        relative({"a": (1.0, 4.0), "b": (value, 1.0)}),
        relative({"a": (3.0, 4.0), "b": (1.0, 0.0)}),
    )
    assert not ours / theirs <= 1.5
    assert not theirs / ours <= 1.5


def test_without_tensor_parallelism(ranks2: RankGroup, tmp_path: Path) -> None:
    """PP2 x VPP2 against plain PyTorch: 0.997 +- 0.009 was measured over these five samples, 0.996 +- 0.003 with eight of other runs.

    The bound, 1.03, is four standard errors of five samples above. Ours is rounded less at the head and in products of several
    projections, and once a micro batch more in weight gradients.
    """
    errors = errors_of_run(ranks2, "pp2_vpp2", tmp_path, seed=0, steps=6)
    assert relative(errors["ours"][0]) > 1e-3  # bf16 it was
    assert ratio(errors, "plain") <= 1.03


def test_one_sample_with_tensor_parallelism(ranks4: RankGroup, tmp_path: Path) -> None:
    """One sample such as the 12 of the next test, against plain PyTorch rounded in halves.

    The mean's standard error of 0.003 there is a spread of 0.010 of single samples; the bound, 1.04, is four of these above the mean. One
    more rounding than plain PyTorch's is outside of it, by the last test.
    """
    errors = errors_of_run(ranks4, "tp2_pp2_vpp2_sp", tmp_path, seed=0, steps=2)
    ((ours,), (split,)) = errors["ours"], errors["split"]
    assert relative(ours) > 1e-3  # bf16 it was
    assert relative(ours) <= 1.04 * relative(split)


@pytest.mark.long
def test_with_tensor_parallelism(ranks4: RankGroup, tmp_path: Path) -> None:
    """TP2 x PP2 x VPP2 with sequence parallelism, 12 samples of two models.

    Against plain PyTorch whose linear layers are rounded in halves, as tensor parallelism rounds them: 0.998 +- 0.003 was measured; the
    bound, 1.01, is four standard errors above. Against plain PyTorch as it is: 0.996 +- 0.018 here, 1.019 +- 0.020 in other runs of three
    models; the bound, 1.1, is four above the latter. There the two round other numbers, and single samples differ by up to 20 % either way.
    The worst kind of tensor was at 1.03.
    """
    errors: Errors = {"ours": [], "plain": [], "split": []}
    for seed in (0, 1):
        found = errors_of_run(ranks4, "tp2_pp2_vpp2_sp", tmp_path / str(seed), seed=seed, steps=7)
        errors = {name: errors[name] + found[name] for name in errors}
    assert ratio(errors, "split") <= 1.01
    assert ratio(errors, "plain") <= 1.1
    worst, kind = worst_kind(errors, "split")
    print(f"worst kind: {worst:.3f} ({kind})")
    assert worst <= 1.1, kind


@pytest.mark.long
def test_a_bias_added_to_the_rounded_product_is_seen(ranks4: RankGroup, tmp_path: Path) -> None:
    """Megatron's own linear layer in the place of ours: one more rounding of queries, keys and values is outside of both bounds."""
    errors = errors_of_run(ranks4, "tp2_pp2_vpp2_sp", tmp_path, seed=0, steps=4, megatrons_bias=True)
    assert ratio(errors, "split") > 1.1
    assert ratio(errors, "plain") > 1.1
