"""Switches for speed and memory: the same gradients, losses and weights with them as without, as far as ranks without a GPU can show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import LAYOUTS, OBJECTIVES, VALID, assert_equal, fp64_gradients, megatron_step, step_settings
from kept import some_of
from models import read_hf, worst_error
from ranks import RankGroup
from real_runs import VALID as VALID_OF_RUNS
from real_runs import all_tensors, metrics, settings_of, without_times

from asft_nemo.checkpoint.convert import export_hf

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

OVERLAPPED = {
    "optim.distributed": True,
    "optim.overlap_grad_reduce": True,
    "optim.overlap_param_gather": True,
}
LORA = {"peft.name": "lora", "reference.form": "adapter_disabled"}

TWO_SUMS = "tied_one_stage_megatron_head"
# layout, tied or untied, settings. The head's gradient comes from our loss (fused) or from Megatron's layer (vocab_parallel); where the
# embedding is tied on one stage, two sums meet in one parameter.
FUSION: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied_one_stage": ("tp2_dp2", "tied", OVERLAPPED),
    "untied_stages": ("tp2_pp2_vpp2_sp", "untied", {}),
    TWO_SUMS: (
        "tp2_dp2",
        "tied",
        {**OVERLAPPED, "loss.implementation": "vocab_parallel"},
    ),
    "recomputed": ("tp2_pp2_sp", "untied", {"recompute.granularity": "full"}),
}


@pytest.mark.parametrize("case", some_of(FUSION, kept=["untied_stages", TWO_SUMS]))
def test_gradients_added_up_inside_the_gemm_are_the_same(
    case: str, ranks4: RankGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    """`main_grad` of the second step with `gradient_accumulation_fusion` and without; torch stands in for apex's kernel.

    Bit for bit, except where Megatron's own head and the embedding share a parameter: without the fusion autograd adds their two
    gradients first and the sum to `main_grad` then, with it one after the other.
    """
    layout, weights, more = FUSION[case]
    found = {}
    for name, fused in (("apart", False), ("fused", True)):
        folder = tmp_path / name
        settings = step_settings(
            ranks4,
            models[weights],
            folder / "run",
            {
                **OBJECTIVES["asft"],
                **LAYOUTS[layout][1],
                **more,
                "kernels.gradient_accumulation_fusion": fused,
            },
        )
        calls = ranks4.run(
            "switch_jobs:gradients_by_fused_kernel",
            settings=settings,
            valid=VALID,
            out=str(folder / "gradients"),
        )
        assert all(bool(number) == fused for number in calls)
        export_hf(folder / "gradients", folder / "gradients_hf")
        found[name] = read_hf(folder / "gradients_hf"), without_times(metrics(folder / "run"))
    apart, fused = found["apart"], found["fused"]
    error, where = worst_error(fused[0], apart[0])
    print(f"{case}: largest difference {error:.1e} of max |grad| ({where})")
    assert all(bool(gradient.any()) for gradient in fused[0].values())
    if case == TWO_SUMS:
        assert error <= 1e-6
    else:
        assert error == 0
        assert fused[1] == apart[1]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="kept"),
        pytest.param({"recompute.granularity": "full"}, id="recomputed", marks=pytest.mark.long),
    ],
)
def test_fused_layers_have_the_gradients_of_fp64(
    more: dict[str, Any], ranks4: RankGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    """Megatron's own backward of SwiGLU, which GPUs get; its rotary kernel is Transformer Engine's and is not seen here."""
    settings = {**OBJECTIVES["asft"], **LAYOUTS["tp2_pp2_sp"][1], **more}
    job = "switch_jobs:gradients_by_fused_layers"
    step = megatron_step(ranks4, settings, models["untied"], tmp_path, job=job)
    assert all(calls > 0 for calls in step.answers)
    expected = fp64_gradients(step, settings, models["untied"])
    assert_equal(step, expected, label=f"fused layers {more}")


# settings, and how often Megatron computes through its checkpoint function on a rank of two layers for each micro batch; for the
# feed-forward layer also in the reference's pass, under no_grad, where it keeps nothing
MODULES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "feed_forward": ({"parallel.sequence_parallel": True}, {"recompute.modules": ["mlp"]}, 4),
    "both": ({"precision": "bf16"}, {"recompute.modules": ["core_attn", "mlp"]}, 6),
    # the first layer's feed-forward input comes from frozen weights alone
    "adapters_of_the_feed_forward_layer": (
        {**LORA, "peft.dropout": 0.2, "peft.targets": ["linear_fc1", "linear_fc2"]},
        {"recompute.modules": ["mlp"]},
        4,
    ),
}


@pytest.mark.parametrize(
    "case", some_of(MODULES, kept=["feed_forward", "adapters_of_the_feed_forward_layer"])
)
def test_recomputed_modules_change_nothing(
    case: str, ranks4: RankGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    """Two steps: metrics and weights bit for bit."""
    more, modules, kept_of_micro_batch = MODULES[case]
    found = {}
    for name, switches in (("kept", {}), ("again", {"recompute.granularity": "selective", **modules})):
        settings = {
            **settings_of(models["untied"], tmp_path / name, trainer__max_steps=2),
            **more,
            **switches,
        }
        kept = ranks4.run("recompute_jobs:train_and_count", settings=settings, valid=VALID_OF_RUNS)
        assert kept == [kept_of_micro_batch * 2 * 8 if switches else 0] * 4  # 2 steps of 8 micro batches
        tensors = all_tensors(tmp_path / name / "checkpoints" / "latest")
        found[name] = without_times(metrics(tmp_path / name)), tensors
    (lines, weights), (lines_again, weights_again) = found["kept"], found["again"]
    assert lines_again == lines
    assert [key for key in weights if not torch.equal(weights_again[key], weights[key])] == []


def test_nemo_chooses_no_overlap_by_itself(ranks2: RankGroup) -> None:
    """The callback behind `parallel.tp_comm_overlap` writes this run's settings; without Transformer Engine NeMo would only warn."""
    settings = {
        "objective.name": "asft",
        "model.path": "unused",
        "run.dir": "unused",
        "run.world_size": 8,
        "precision": "bf16",
        "parallel.tp_size": 2,
        "parallel.pp_size": 2,
        "parallel.vpp_size": 2,
        "parallel.sequence_parallel": True,
        "parallel.tp_comm_overlap": True,
        "optim.distributed": True,
    }
    found = ranks2.run("switch_jobs:overlap_choices", settings=settings)[0]
    # on CPU ranks sends do not overlap; on a GPU they do with virtual stages
    model = {"overlap_p2p_comm": False, "batch_p2p_comm": False, "defer_embedding_wgrad_compute": False}
    ddp = {
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
        "overlap_param_gather_with_optimizer_step": False,
        "align_param_gather": False,
        "bucket_size": 40_000_000,
    }
    assert found["with_te"] == {"model": {"tp_comm_overlap": True, **model}, "ddp": ddp}
    assert found["without_te"] == {"model": {"tp_comm_overlap": False, **model}, "ddp": ddp}


OFFLOADED = {
    "parallel.pp_size": 1,
    "precision": "bf16",
    "optim.distributed": True,
    "optim.clip_grad": 1e6,  # the norm is summed in another order
    "trainer.max_steps": 4,
    "trainer.checkpoint_every": 2,
    "trainer.keep": "last:2",
}


def test_optimizer_state_in_host_memory_trains_alike(
    ranks4: RankGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    """Four steps: with a half and with all of the state in host memory bit for bit; the device's Adam, another kernel, within rounding."""
    found = {}
    for share in (0.0, 0.5, 1.0):
        settings = {
            **settings_of(models["untied"], tmp_path / str(share)),
            **OFFLOADED,
            "optim.cpu_offload": share,
        }
        held = ranks4.run("switch_jobs:train_and_weigh_offload", settings=settings, valid=VALID_OF_RUNS)
        assert all(abs(part - share) < 0.2 for part in held), held
        tensors = all_tensors(tmp_path / str(share) / "checkpoints" / "latest")
        found[share] = without_times(metrics(tmp_path / str(share))), tensors
    assert found[0.5][0] == found[1.0][0]
    assert [key for key, value in found[1.0][1].items() if not torch.equal(found[0.5][1][key], value)] == []
    losses = [[line["loss"] for line in found[share][0]] for share in (0.0, 1.0)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert set(found[0.0][1]) == set(found[1.0][1])
    state = [key for key in found[1.0][1] if key.startswith("optimizer")]
    assert state
    for key in state:
        torch.testing.assert_close(found[1.0][1][key], found[0.0][1][key], rtol=1e-2, atol=1e-4, msg=key)


@pytest.mark.long
def test_offloaded_state_resumes(ranks4: RankGroup, models: dict[str, Path], tmp_path: Path) -> None:
    """Two steps, a checkpoint, two more: bit for bit the run that never ended, in metrics, weights and optimizer state."""
    settings = {**settings_of(models["untied"], tmp_path), **OFFLOADED, "optim.cpu_offload": 0.5}
    job = "switch_jobs:train_and_weigh_offload"
    ranks4.run(job, settings=settings, valid=VALID_OF_RUNS)
    straight, folder = metrics(tmp_path), tmp_path / "checkpoints"
    (folder / "step_4").rename(tmp_path / "straight")
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("step_2")
    ranks4.run(job, settings={**settings, "trainer.resume": "must"}, valid=VALID_OF_RUNS)
    assert without_times(metrics(tmp_path)) == without_times(straight)
    one, other = (all_tensors(checkpoint) for checkpoint in (tmp_path / "straight", folder / "step_4"))
    assert set(one) == set(other)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


# over PP2 x DP2; the last one is all of it together
COMBINED: dict[str, dict[str, Any]] = {
    "reductions_overlapped": {"optim.overlap_grad_reduce": True},
    "state_sharded": {"optim.distributed": True},
    "state_sharded_reductions_overlapped": {"optim.distributed": True, "optim.overlap_grad_reduce": True},
    "uneven_stages": {"parallel.last_stage_layers": 1},
    "together": {**OVERLAPPED, "parallel.last_stage_layers": 1, "recompute.granularity": "full"},
}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["together"], id="together"),
        pytest.param(
            [name for name in COMBINED if name != "together"], id="one_by_one", marks=pytest.mark.long
        ),
    ],
)
def test_any_combination_trains_alike(
    names: list[str], ranks4: RankGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    """Three steps: losses, divergences and the checkpoint's weights are equal bit for bit; norms, summed in another order, to rounding."""
    found = {}
    for name, switches in {"plain": {}, **{name: COMBINED[name] for name in names}}.items():
        settings = {
            **settings_of(models["untied"], tmp_path / name, trainer__max_steps=3, optim__clip_grad=1e6),
            "parallel.tp_size": 1,
            **switches,
        }
        ranks4.run("jobs:train_steps", settings=settings, valid=VALID_OF_RUNS)
        tensors = all_tensors(tmp_path / name / "checkpoints" / "latest")
        weights = {key: value for key, value in tensors.items() if key.startswith("module.")}
        lines = without_times(metrics(tmp_path / name))
        found[name] = [line.pop("grad_norm") for line in lines], lines, weights
    norms, lines, weights = found.pop("plain")
    for name, (its_norms, its_lines, its_weights) in found.items():
        assert its_norms == pytest.approx(norms, rel=1e-5), name
        assert its_lines == lines, name
        assert set(its_weights) == set(weights), name
        assert [key for key in weights if not torch.equal(its_weights[key], weights[key])] == [], name
