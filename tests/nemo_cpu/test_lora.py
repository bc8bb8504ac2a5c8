"""LoRA on real gloo ranks: gradients, the reference with adapters off, dropout, adapter-only checkpoints, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import BATCH, BOUND, LAYOUTS, LENGTH, second_batch
from jobs import RandomTokens, run_config
from kept import some_of
from models import load64, make_model, worst_error
from ranks import RankGroup
from real_runs import VALID, all_tensors, metrics, settings_of, without_times
from torch import Tensor

from asft_nemo.checkpoint.adapters import AdapterDescription, adapter_description
from asft_nemo.errors import CheckpointError
from asft_nemo.losses import dense_loss
from asft_nemo.objectives import objective
from asft_nemo.run_dir import resume_from

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

RANK, ALPHA = 8, 16.0
LAYERS = "module.decoder.layers"


def lora(model: Path, folder: Path, **more: Any) -> dict[str, Any]:
    return settings_of(model, folder, **{"peft__name": "lora", "reference__form": "adapter_disabled", **more})


def adapters_in(checkpoint: Path) -> dict[str, Tensor]:
    return {key: value for key, value in all_tensors(checkpoint).items() if key.startswith("module.")}


def merged(base: dict[str, Tensor], adapters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base's fp64 weights under Hugging Face names plus alpha / rank * B A, rearranged here by hand; differentiable in A and B.

    The model has 4 heads of 16 in 2 query groups: linear_qkv is (query, query, key, value) for each group.
    """

    def update(name: str) -> Tensor:  # [layers, out, in]
        return ALPHA / RANK * adapters[f"{name}.linear_out.weight"] @ adapters[f"{name}.linear_in.weight"]

    qkv = update(f"{LAYERS}.self_attention.linear_qkv.adapter").unflatten(1, (2, 4, 16))
    gate, up = update(f"{LAYERS}.mlp.linear_fc1.adapter").chunk(2, dim=1)
    updates = {
        "self_attn.q_proj": qkv[:, :, :2].flatten(1, 3),
        "self_attn.k_proj": qkv[:, :, 2].flatten(1, 2),
        "self_attn.v_proj": qkv[:, :, 3].flatten(1, 2),
        "self_attn.o_proj": update(f"{LAYERS}.self_attention.linear_proj.adapter"),
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "mlp.down_proj": update(f"{LAYERS}.mlp.linear_fc2.adapter"),
    }
    result = dict(base)
    for part, values in updates.items():
        for layer, value in enumerate(values):
            name = f"model.layers.{layer}.{part}.weight"
            result[name] = base[name] + value
    return result


def oracle(base: Path, adapters: dict[str, Tensor], kl_weight: float) -> tuple[dict[str, Tensor], float]:
    """fp64 gradients of the adapters by autograd through the dense definition, and the loss, of the second global batch."""
    network = load64(base).requires_grad_(False)
    weights = {name: value.detach() for name, value in network.named_parameters()}
    leaves = {name: value.double().requires_grad_() for name, value in adapters.items()}
    data = RandomTokens(size=64, sequence_length=LENGTH, valid=VALID)
    items = [data[index] for (index,) in second_batch(data)]
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    policy = torch.func.functional_call(
        network, merged(weights, leaves), kwargs={"input_ids": batch["tokens"]}
    )
    output = dense_loss(
        policy.logits.flatten(0, 1),
        batch["labels"].flatten(),
        batch["loss_mask"].flatten(),
        objective=objective("asft", kl_weight=kl_weight),
        ref_logits_TV=network(input_ids=batch["tokens"]).logits.flatten(0, 1),
    )
    loss = output.loss_sum / output.num_tokens
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True)), float(loss.detach())


@pytest.mark.parametrize(
    ("layout", "weights"),
    some_of(
        [
            ("tp2_pp2", "untied"),
            ("tp2_pp2_sp", "untied"),
            ("tp2_pp2_vpp2_sp", "untied"),
            ("pp2_vpp2", "tied"),
        ],
        kept=("tp2_pp2_vpp2_sp-untied", "pp2_vpp2-tied"),
    ),
)
def test_gradients_equal_the_oracle(
    layout: str, weights: str, models: dict[str, Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Every adapter's gradient after one update, against W + alpha / rank * B A in a single fp64 process."""
    world, parallel = LAYOUTS[layout]
    settings = {
        **parallel,
        "run.world_size": world,
        "objective.name": "asft",
        "objective.kl_weight": 0.5,
        "reference.form": "adapter_disabled",
        "peft.name": "lora",
        "peft.rank": RANK,
        "peft.alpha": ALPHA,
        "peft.dropout": 0.0,
        "model.path": str(models[weights]),
        "run.dir": str(tmp_path / "run"),
        "data.sequence_length": LENGTH,
        "trainer.global_batch_size": BATCH,
        "optim.lr": 3e-3,
        "optim.warmup_ratio": 0.0,
    }
    group = request.getfixturevalue(f"ranks{world}")
    group.run("lora_jobs:lora_gradients", settings=settings, valid=VALID, out=str(tmp_path / "gradients"))
    policy = adapters_in(tmp_path / "run" / "checkpoints" / "step_1")
    assert len(policy) == 8
    assert all(bool(value.any()) for value in policy.values())  # B, too, has left zero
    expected, loss = oracle(models[weights], policy, kl_weight=0.5)
    error, where = worst_error(adapters_in(tmp_path / "gradients"), expected)
    print(f"LoRA {layout} {weights}: worst gradient error {error:.1e} of max |grad| ({where})")
    assert error <= BOUND, (error, where)
    first, second = metrics(tmp_path / "run")
    assert first["kl"] == 0.0
    assert second["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("precision", some_of(["fp32", "bf16"], kept=["fp32"]))
def test_the_reference_is_the_untouched_base(
    ranks4: RankGroup, model: Path, tmp_path: Path, precision: str
) -> None:
    """Step after step the logits with adapters off are those of the base, bit for bit, and only adapters are trained."""
    layout = {"fp32": {"parallel__vpp_size": 2}, "bf16": {"parallel__sequence_parallel": True}}[precision]
    settings = lora(model, tmp_path / "run", trainer__max_steps=3, precision=precision, **layout)
    facts = ranks4.run("lora_jobs:watch_reference", settings=settings, valid=VALID)
    for rank in facts:
        # 2 layers of a stage x 4 targets x A and B
        assert rank["adapters"] == rank["bucketed"] == rank["optimized"] == 16
        assert rank["trained_is_adapters"]
        assert rank["base_gradients"] == 0
        assert rank["on_again"]
        assert rank["training"]
        assert not rank["returns_hidden"]
    last_stage = [rank["steps"] for rank in facts if rank["steps"]]
    assert len(last_stage) == 2
    for steps in last_stage:
        print(
            f"{precision}: weights that ask for gradients, hidden states differ by {[free for _, free in steps]}"
        )
        assert [frozen for frozen, _ in steps] == [0.0] * 3
    lines = metrics(tmp_path / "run")
    assert lines[0]["kl"] == 0.0
    assert lines[2]["kl"] > lines[1]["kl"] > 0.0


@pytest.mark.long
def test_a_resident_reference_gives_the_same_bits(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """`reference=resident` beside LoRA: the KL starts at exactly 0, metrics and adapters are those of `adapter_disabled`."""
    for form in ("adapter_disabled", "resident"):
        settings = lora(model, tmp_path / form, trainer__max_steps=2, reference__form=form)
        ranks4.run("jobs:train_steps", settings=settings, valid=VALID)
    one, other = (metrics(tmp_path / form) for form in ("adapter_disabled", "resident"))
    assert one[0]["kl"] == 0.0 < one[1]["kl"]
    assert without_times(one) == without_times(other)
    same_checkpoints(
        *(tmp_path / form / "checkpoints" / "latest" for form in ("adapter_disabled", "resident"))
    )


def same_checkpoints(one: Path, other: Path) -> None:
    """Adapters and optimizer state are equal bit for bit."""
    found, expected = all_tensors(one), all_tensors(other)
    assert set(found) == set(expected)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_the_reference_pass_moves_no_dropout_mask(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """dft with dropout, with a forced pass of the reference before every step and without: the same bits. Dropout itself matters."""
    common = {
        "objective__name": "dft",
        "reference__form": "none",
        "trainer__max_steps": 3,
        "parallel__sequence_parallel": True,
        "peft__dropout": 0.05,
    }
    ranks4.run("jobs:train_steps", settings=lora(model, tmp_path / "plain", **common), valid=VALID)
    forced = lora(model, tmp_path / "forced", **common)
    ranks4.run("lora_jobs:train_with_idle_reference", settings=forced, valid=VALID)
    without = lora(model, tmp_path / "without", **{**common, "peft__dropout": 0.0})
    ranks4.run("jobs:train_steps", settings=without, valid=VALID)
    plain = without_times(metrics(tmp_path / "plain"))
    assert without_times(metrics(tmp_path / "forced")) == plain
    same_checkpoints(*(tmp_path / name / "checkpoints" / "latest" for name in ("plain", "forced")))
    assert metrics(tmp_path / "without")[0]["grad_norm"] != plain[0]["grad_norm"]


def test_resume_is_bit_exact_from_adapters_alone(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """4 steps straight equal 2, a stop in the third, and 2 more, dropout included; a checkpoint is a few adapters, whatever the base."""
    common = {"trainer__max_steps": 4, "trainer__checkpoint_every": 2, "trainer__keep": "last:2"}
    straight = lora(model, tmp_path / "straight", **common)
    ranks4.run("jobs:train_steps", settings=straight, valid=VALID)
    stopped = lora(model, tmp_path / "stopped", **common)
    ranks4.run("jobs:train_and_die", settings=stopped, valid=VALID, after_step=3)
    stopped["trainer.resume"] = "must"
    ranks4.run("jobs:train_steps", settings=stopped, valid=VALID)
    lines = metrics(tmp_path / "straight")
    assert without_times(metrics(tmp_path / "stopped")) == without_times(lines)
    checkpoint = tmp_path / "straight" / "checkpoints" / "step_4"
    same_checkpoints(checkpoint, tmp_path / "stopped" / "checkpoints" / "step_4")
    check_contents(checkpoint)
    check_refusals(stopped)
    # the adapters of TP2 x PP2 go on at PP2 x DP2: the masks are other ones, the reference is not
    moved = {**stopped, "parallel.tp_size": 1, "trainer.max_steps": 5}
    record = json.loads((tmp_path / "stopped" / "run.json").read_text())
    record["config"]["trainer"]["max_steps"] = 5
    (tmp_path / "stopped" / "run.json").write_text(json.dumps(record))
    ranks4.run("jobs:train_steps", settings=moved, valid=VALID)
    assert metrics(tmp_path / "stopped")[4]["kl"] > 0.5 * lines[3]["kl"]


def check_contents(checkpoint: Path) -> None:
    """Adapters, two moments of each, and what merging needs to know."""
    tensors = all_tensors(checkpoint)
    assert all(".adapter." in key for key in tensors)
    rows = {"linear_qkv": 128, "linear_proj": 64, "linear_fc1": 256, "linear_fc2": 64}
    columns = {"linear_qkv": 64, "linear_proj": 64, "linear_fc1": 64, "linear_fc2": 128}
    adapters = 4 * RANK * (sum(rows.values()) + sum(columns.values()))
    own = {key: value for key, value in tensors.items() if key.startswith("module.")}
    assert sum(value.numel() for value in own.values()) == adapters == 26_624
    assert sum(value.numel() for value in tensors.values()) == 3 * adapters
    targets = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    assert adapter_description(checkpoint) == AdapterDescription(RANK, ALPHA, 0.05, targets)


def check_refusals(settings: dict[str, Any]) -> None:
    """A checkpoint of other adapters, or of none, is refused before anything is started."""
    for change, said in (
        ({"peft.rank": 4}, r"linear_in.weight is \[4, 8, 64\] and should be \[4, 4, 64\]"),
        ({"peft.targets": ["linear_qkv"]}, "should be absent"),
        ({"peft.name": "none"}, "left over: .*adapter"),
    ):
        with pytest.raises(CheckpointError, match=said):
            resume_from(run_config({**settings, **change}))


def test_a_stage_without_layers_saves_none_of_the_base(ranks2: RankGroup, tmp_path: Path) -> None:
    """The loss counts as a layer: the last of two stages of a model of one layer is the head alone, which no adapter sits on."""
    base = make_model(tmp_path / "model", tied=False, num_layers=1)
    settings = {
        **lora(base, tmp_path / "run", parallel__account_for_loss=True, trainer__max_steps=1),
        "run.world_size": 2,
        "parallel.tp_size": 1,
    }
    ranks2.run("jobs:train_steps", settings=settings, valid=VALID)
    assert all(".adapter." in key for key in adapters_in(tmp_path / "run" / "checkpoints" / "latest"))
    more = {**settings, "trainer.resume": "must"}  # whose check wants the adapters and nothing else
    assert resume_from(run_config(more)) == (tmp_path / "run" / "checkpoints" / "step_1").resolve()
