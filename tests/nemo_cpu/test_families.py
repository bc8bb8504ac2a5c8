"""Real training of every family: gradients equal transformers' in fp64, the first KL is 0, what was trained leaves as it came.

The other tests of this folder train Qwen2; these are its siblings, each in the variant that differs most, each at another layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import (
    BOUND,
    LAYOUTS,
    LENGTH,
    OBJECTIVES,
    VALID,
    assert_equal,
    fp64_gradients,
    megatron_step,
    random_tokens,
    second_batch,
)
from jobs import VOCAB
from kept import some_of
from models import oracle_gradients, read_hf, worst_error
from ranks import RankGroup
from real_runs import metrics
from transformers import AutoConfig, AutoModelForCausalLM

from asft_nemo.checkpoint import export_hf, export_merged, verify
from asft_nemo.objectives import objective

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3_tied": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "llama2": {"model_type": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "llama32": {"model_type": "llama", "rope_scaling": LLAMA3_SCALING, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "head_dim": 32, "sliding_window": LENGTH, "rms_norm_eps": 1e-5},
}
CASES = {
    "qwen3": "tp2_pp2_sp",
    "qwen3_tied": "tp2_dp2",
    "llama2": "tp2_pp2",
    "llama32": "tp2_pp2_vpp2_sp",
    "mistral": "tp2_pp2_vpp2_sp",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random 4-layer model of every family in fp32, with distinguishable norms."""
    folder = tmp_path_factory.mktemp("families")
    for name, special in FAMILIES.items():
        common = {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            "initializer_range": 0.1,
        }
        settings = {key: value for key, value in {**common, **special}.items() if key != "model_type"}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(special["model_type"], **settings))
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in FAMILIES}


@pytest.mark.parametrize("family", some_of(CASES, kept=["qwen3_tied", "llama32", "mistral"]))
def test_training_is_exact(
    family: str, ranks4: RankGroup, models: dict[str, Path], tmp_path: Path, record_property: Any
) -> None:
    _, parallel = LAYOUTS[CASES[family]]
    settings = {**OBJECTIVES["asft"], **parallel}
    step = megatron_step(ranks4, settings, models[family], tmp_path)
    expected = fp64_gradients(step, settings, models[family])
    error = assert_equal(step, expected, label=f"{family} at {CASES[family]}")
    record_property("worst_relative_error", error)
    policy = step.policy
    first, second = metrics(tmp_path / "run")
    assert first["kl"] == 0.0
    assert second["kl"] > 0.0
    assert verify(tmp_path / "run" / "base", models[family]).identical
    assert verify(tmp_path / "run" / "checkpoints" / "step_1", policy).identical
    assert (policy / "config.json").read_bytes() == (models[family] / "config.json").read_bytes()
    before, after = read_hf(models[family]), read_hf(policy)
    assert [name for name, value in after.items() if torch.equal(value, before[name])] == []


def test_a_scaling_that_was_forgotten_would_show(models: dict[str, Path], tmp_path: Path) -> None:
    """The same weights without their rope scaling have gradients that are not equal within the bound."""
    model = AutoModelForCausalLM.from_pretrained(models["llama32"], dtype=torch.float32)
    model.config.rope_scaling = None
    model.save_pretrained(tmp_path / "unscaled")
    data = random_tokens()
    scaled, unscaled = (
        oracle_gradients(folder, objective("sft", kl_weight=0.0), [[0, 2]], data)[0]
        for folder in (models["llama32"], tmp_path / "unscaled")
    )
    assert worst_error(unscaled, scaled)[0] > 50 * BOUND


def test_adapters_of_wide_heads_merge_to_what_was_trained(
    ranks4: RankGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    """LoRA on Qwen3, whose attention is wider than its residual stream: the second step's loss is that of the first one's merge."""
    settings = {
        **OBJECTIVES["asft"],
        **LAYOUTS["tp2_pp2_sp"][1],
        "model.path": str(models["qwen3"]),
        "run.dir": str(tmp_path / "run"),
        "run.world_size": 4,
        "peft.name": "lora",
        "peft.dropout": 0.0,
        "reference.form": "adapter_disabled",
        "data.sequence_length": LENGTH,
        "optim.lr": 3e-3,
        "optim.warmup_ratio": 0.0,
        "trainer.max_steps": 2,
        "trainer.checkpoint_every": 1,
        "trainer.keep": "last:2",
    }
    ranks4.run("jobs:train_steps", settings=settings, valid=VALID)
    export_merged(tmp_path / "run" / "checkpoints" / "step_1", tmp_path / "merged")
    data = random_tokens()
    chosen = objective("asft", kl_weight=0.5)
    batches = second_batch(data)
    _, expected = oracle_gradients(tmp_path / "merged", chosen, batches, data, ref=models["qwen3"])
    _, unmoved = oracle_gradients(models["qwen3"], chosen, batches, data, ref=models["qwen3"])
    first, second = metrics(tmp_path / "run")
    assert first["kl"] == 0.0
    assert second["loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(unmoved - expected) > 1e-3 * expected


@pytest.mark.long
def test_the_distributed_optimizers_checkpoint_exports_what_the_ordinary_ones_does(
    ranks4: RankGroup, models: dict[str, Path], tmp_path: Path
) -> None:
    found = {}
    for name, distributed in (("ordinary", False), ("distributed", True)):
        settings = {
            **OBJECTIVES["asft"],
            **LAYOUTS["tp2_dp2"][1],
            "model.path": str(models["qwen3"]),
            "run.dir": str(tmp_path / name),
            "run.world_size": 4,
            "optim.distributed": distributed,
            "optim.clip_grad": 1e6,  # the norm is summed in another order over shards
        }
        ranks4.run("jobs:train_steps", settings=settings, valid=VALID)
        export_hf(tmp_path / name / "checkpoints" / "latest", tmp_path / f"{name}_hf")
        found[name] = read_hf(tmp_path / f"{name}_hf")
    assert set(found["ordinary"]) == set(read_hf(models["qwen3"]))
    assert [
        key for key, value in found["ordinary"].items() if not torch.equal(value, found["distributed"][key])
    ] == []
