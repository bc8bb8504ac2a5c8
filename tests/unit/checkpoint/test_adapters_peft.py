"""Adapters out to PEFT and back: the library itself loads them, computes what the merged model computes, and nothing is lost on the way."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import write_adapters, write_base
from hf_cases import HIDDEN, LAYERS, assert_same_bits, config_of, read_hf, write_variant
from safetensors.torch import load_file, save_file

from asft_nemo.checkpoint.adapters import TARGETS, AdapterDescription, AdapterReader
from asft_nemo.checkpoint.lora_import import import_peft
from asft_nemo.checkpoint.lora_merge import export_merged
from asft_nemo.checkpoint.lora_peft import export_peft
from asft_nemo.errors import CheckpointError
from asft_nemo.model import read_model_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ALL = AdapterDescription(rank=4, alpha=6.0, dropout=0.05, targets=TARGETS)
TOKENS = torch.arange(20).reshape(2, 10)


def load(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's A and B, read back by torch itself."""
    import torch.distributed.checkpoint as dcp

    described = dcp.FileSystemReader(checkpoint / "weights").read_metadata().state_dict_metadata
    loaded = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in described.items()
        if key.startswith("module.")
    }
    dcp.load(loaded, checkpoint_id=checkpoint / "weights", no_dist=True)
    return loaded


@pytest.mark.parametrize("targets", [TARGETS, ("linear_qkv",), ("linear_fc1", "linear_proj")], ids=" ".join)
def test_peft_loads_it_and_computes_what_the_merged_model_computes(
    tmp_path: Path, targets: tuple[str, ...]
) -> None:
    adapters = AdapterDescription(rank=4, alpha=6.0, dropout=0.05, targets=targets)
    write_base(tmp_path / "base")
    write_adapters(tmp_path / "ckpt", tmp_path / "base", adapters=adapters)
    report = export_peft(tmp_path / "ckpt", tmp_path / "peft")
    export_merged(tmp_path / "ckpt", tmp_path / "merged")
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    base = logits(load(tmp_path / "base"))
    model = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "peft")
    in_model = {name for name, _ in model.named_parameters() if ".lora_" in name}
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(in_model) == len(tensors) == report.num_tensors
    merged = logits(load(tmp_path / "merged"))
    error, moved = relative(logits(model), merged), relative(base, merged)
    print(f"PEFT against merged {error:.1e}; base against merged {moved:.1e}")
    assert error < 1e-5
    assert moved > 1e-2


def test_the_description_is_the_run_s(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_adapters(tmp_path / "ckpt", tmp_path / "base", adapters=ALL, recorded="models/base")
    names = {}
    for out, more in (
        ("recorded", {}),
        ("given", {"base_name": "Qwen/Qwen2.5-7B"}),
        ("by base", {"base_dir": tmp_path / "base"}),
    ):
        export_peft(tmp_path / "ckpt", tmp_path / out, **more)
        text = (tmp_path / out / "adapter_config.json").read_text()
        assert ".partial" not in text
        names[out] = json.loads(text)
    assert [names[out]["base_model_name_or_path"] for out in names] == [
        "models/base",
        "Qwen/Qwen2.5-7B",
        str(tmp_path / "base"),
    ]
    config = peft.PeftConfig.from_pretrained(tmp_path / "recorded")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 6, 0.05, "none")
    assert config.task_type == "CAUSAL_LM"
    assert config.target_modules == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "adapters",
    [
        ALL,
        AdapterDescription(3, 16.5, 0.0, ("linear_fc1",)),
        AdapterDescription(2, 2.0, 0.1, ("linear_fc2", "linear_qkv")),
    ],
    ids=["all", "gate and up", "two"],
)
def test_out_and_in_again_is_bit_exact(
    tmp_path: Path, adapters: AdapterDescription, dtype: torch.dtype
) -> None:
    write_base(tmp_path / "base", dtype)
    tensors = write_adapters(tmp_path / "ckpt", tmp_path / "base", adapters=adapters, dtype=dtype)
    export_peft(tmp_path / "ckpt", tmp_path / "peft")
    for name, asked in (("same", adapters), ("derived", None)):
        report = import_peft(tmp_path / "peft", tmp_path / name, hf_dir=tmp_path / "base", adapters=asked)
        assert report.exact
        assert report.adapters.rank == adapters.rank
        assert report.adapters.scale == adapters.scale
        assert set(report.adapters.targets) == set(adapters.targets)
        assert_same_bits(stored(tmp_path / name), tensors)
    export_peft(tmp_path / "same", tmp_path / "again")
    assert_same_bits(read_hf(tmp_path / "again"), read_hf(tmp_path / "peft"))


def trained_by_peft(folder: Path, base: Path, **config: Any) -> Any:
    """Saves an adapter as PEFT does, with random B; returns the model with it."""
    torch.manual_seed(2)
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **config}
    model = peft.get_peft_model(load(base), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FROM_PEFT: dict[str, tuple[dict[str, Any], int, float]] = {
    # what PEFT trained -> the rank and alpha that hold it
    "query and value": ({"target_modules": ["q_proj", "v_proj"]}, 8, 16.0),
    "everything": ({"target_modules": EVERY}, 12, 24.0),
    "all-linear": ({"target_modules": "all-linear"}, 12, 24.0),
    "up alone": ({"target_modules": ["up_proj"]}, 4, 8.0),
    "some layers": ({"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [0, 2]}, 4, 8.0),
    "by full name": ({"target_modules": ["model.layers.1.self_attn.k_proj", "layers.0.mlp.down_proj"]}, 4, 8.0),
    "rslora": ({"target_modules": ["o_proj", "k_proj"], "use_rslora": True}, 4, 16.0),
    "gaussian": ({"target_modules": ["o_proj"], "init_lora_weights": "gaussian"}, 4, 8.0),
    "own ranks": ({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 6}, "alpha_pattern": {"v_proj": 12}}, 10, 20.0),
    "own alphas": ({"target_modules": EVERY, "alpha_pattern": {"layers.1.mlp.up_proj": 5, "v_proj": 32}}, 12, 24.0),
}  # fmt: skip


@pytest.mark.parametrize("case", FROM_PEFT)
def test_adapters_that_peft_trained_compute_the_same_here(tmp_path: Path, case: str) -> None:
    """Query, key and value have an A each: the rank becomes their sum, and the function stays."""
    config, rank, alpha = FROM_PEFT[case]
    write_base(tmp_path / "base")
    model = trained_by_peft(tmp_path / "peft", tmp_path / "base", **config)
    report = import_peft(tmp_path / "peft", tmp_path / "ckpt", hf_dir=tmp_path / "base")
    assert (report.adapters.rank, report.adapters.alpha) == (rank, alpha)
    export_merged(tmp_path / "ckpt", tmp_path / "merged", base_dir=tmp_path / "base")
    found, expected = read_hf(tmp_path / "merged"), model.merge_and_unload().state_dict()
    base = read_hf(tmp_path / "base")
    changed = {name for name, value in base.items() if not torch.equal(value, found[name])}
    assert changed == {name for name, value in base.items() if not torch.equal(value, expected[name])}
    assert changed
    worst = max(relative(found[name], expected[name]) for name in found)
    print(f"{case}: {len(changed)} weights, worst difference {worst:.1e}")
    assert worst < 3e-7


@pytest.mark.parametrize("variant", ["qwen3", "llama-2", "llama-3.2", "mistral-v0.3"])
def test_of_every_family(tmp_path: Path, variant: str) -> None:
    """PEFT's own adapter, what comes back of it, and the merged model: the same logits."""
    write_variant(tmp_path / "base", config_of(variant, dtype=torch.float32))
    expected = logits(trained_by_peft(tmp_path / "peft", tmp_path / "base", target_modules=EVERY))
    import_peft(tmp_path / "peft", tmp_path / "ckpt", hf_dir=tmp_path / "base")
    export_peft(tmp_path / "ckpt", tmp_path / "again")
    export_merged(tmp_path / "ckpt", tmp_path / "merged", base_dir=tmp_path / "base")
    base = load(tmp_path / "base")
    moved = relative(logits(base), expected)
    again = relative(logits(peft.PeftModel.from_pretrained(base, tmp_path / "again")), expected)
    merged = relative(logits(load(tmp_path / "merged")), expected)
    print(f"{variant}: moved {moved:.1e}, PEFT again {again:.1e}, merged {merged:.1e}")
    assert moved > 1e-2
    assert max(again, merged) < 1e-5


@pytest.mark.parametrize(("alpha", "exact"), [(40.0, True), (20.0, False), (3.0, False)])
def test_a_run_may_have_more_rank_more_targets_and_another_alpha(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, alpha: float, exact: bool
) -> None:
    """The function stays; rank and targets beyond the directory's start as fresh ones do, so that they learn."""
    write_base(tmp_path / "base")
    model = trained_by_peft(
        tmp_path / "peft", tmp_path / "base", target_modules=["q_proj", "v_proj", "o_proj"]
    )
    mine = AdapterDescription(
        rank=20, alpha=alpha, dropout=0.0, targets=("linear_qkv", "linear_proj", "linear_fc2")
    )
    report = import_peft(
        tmp_path / "peft", tmp_path / "ckpt", hf_dir=tmp_path / "base", adapters=mine, seed=3
    )
    assert report.exact is exact
    assert ("peft.alpha=40 would keep every number" in caplog.text) is not exact
    tensors = stored(tmp_path / "ckpt")
    attention = "module.decoder.layers.self_attention"
    for target, used in (
        (f"{attention}.linear_qkv", 8),
        (f"{attention}.linear_proj", 4),
        ("module.decoder.layers.mlp.linear_fc2", 0),
    ):
        a, b = (tensors[f"{target}.adapter.linear_{side}.weight"] for side in ("in", "out"))
        assert not b[:, :, used:].any()
        assert bool((a[:, used:] != 0).all())
        assert len({float(layer.sum()) for layer in a[:, used:]}) == LAYERS
    export_merged(tmp_path / "ckpt", tmp_path / "merged", base_dir=tmp_path / "base")
    found, expected = read_hf(tmp_path / "merged"), model.merge_and_unload().state_dict()
    assert max(relative(found[name], expected[name]) for name in found) < 1e-6
    again = import_peft(
        tmp_path / "peft", tmp_path / "again", hf_dir=tmp_path / "base", adapters=mine, seed=3
    )
    assert_same_bits(stored(again.path), tensors)


def test_by_rows_it_is_what_it_is_as_a_whole(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_adapters(tmp_path / "ckpt", tmp_path / "base", adapters=ALL)
    with AdapterReader(tmp_path / "ckpt", read_model_spec(tmp_path / "base")) as reader:
        template = "model.layers.{layer}.self_attn.q_proj.weight"
        whole = reader.b_rows("linear_qkv", template, 1, 0, HIDDEN)
        assert torch.equal(
            torch.cat([reader.b_rows("linear_qkv", template, 1, i, i + 1) for i in range(HIDDEN)]), whole
        )


def change_config(peft_dir: Path, **changes: Any) -> None:
    path = peft_dir / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(peft_dir: Path, change: Any) -> None:
    path = peft_dir / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED: dict[str, tuple[Any, str]] = {
    "dora": (lambda d: change_config(d, use_dora=True), r"says use_dora=true: train the adapter without DoRA"),
    "bias": (lambda d: change_config(d, bias="all"), r'says bias="all": only plain LoRA can go on training here'),
    "more modules": (lambda d: change_config(d, modules_to_save=["lm_head"]), r'says modules_to_save=\["lm_head"\]: merge'),
    "pissa": (lambda d: change_config(d, init_lora_weights="pissa"), r'says init_lora_weights="pissa": only plain'),
    "another method": (lambda d: change_config(d, peft_type="LOHA"), r'says peft_type="LOHA"'),
    "another task": (lambda d: change_config(d, task_type="SEQ_CLS"), r'says task_type="SEQ_CLS"'),
    "unknown feature": (lambda d: change_config(d, use_tomorrow={"a": 1}), r'says use_tomorrow=\{"a": 1\}'),
    "pattern of alphas": (lambda d: change_config(d, alpha_pattern={"q.*": 3}), "which is no plain name"),
    "no rank": (lambda d: change_config(d, r=None), "is malformed"),
    "infinite alpha": (lambda d: change_config(d, lora_alpha=float("inf")), "is malformed"),
    "not json": (lambda d: (d / "adapter_config.json").write_text("{"), "is malformed"),
    "a list": (lambda d: (d / "adapter_config.json").write_text("[]"), "is malformed"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), r"holds no adapter_config.json"),
    "a pickle": (
        lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
        r"holds no adapter_model.safetensors \(adapter_model.bin can run code when it is read\)",
    ),
    "cut short": (
        lambda d: (d / "adapter_model.safetensors").write_bytes((d / "adapter_model.safetensors").read_bytes()[:-9]),
        "copy or download",
    ),
    "a tensor missing": (lambda d: change_tensors(d, lambda t: t.pop(FIRST)), "holds only lora_B of model.layers.0.self_attn.q_proj"),
    "a layer missing": (
        lambda d: change_tensors(d, lambda t: [t.pop(FIRST.replace("A.w", f"{side}.w")) for side in "AB"]),
        r"does not hold the adapters that target_modules names \(first difference: model.layers.0.self_attn.q_proj\)",
    ),
    "another rank": (lambda d: change_config(d, r=5), r"has shapes \[4, 48\] and \[32, 4\] where rank 5"),
    "an embedding": (
        lambda d: change_tensors(d, lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 4)})),
        "which is no adapter of a linear layer",
    ),
    "the head": (
        lambda d: change_tensors(d, lambda t: t.update({FIRST.replace("model.layers.0.self_attn.q_proj", "lm_head"): torch.ones(4, 32)})),
        "adapts lm_head, which is none of this model's layers that can be adapted",
    ),
    "integers": (lambda d: change_tensors(d, lambda t: t.update({FIRST: t[FIRST].int()})), "is of torch.int32: save it in fp32"),
    "nothing": (lambda d: change_tensors(d, lambda t: t.clear()), "holds no adapters"),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    write_base(folder / "base")
    trained_by_peft(folder / "peft", folder / "base", target_modules=["q_proj", "v_proj", "down_proj"])
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_on_is_one_sentence_and_leaves_nothing(tmp_path: Path, saved: Path, case: str) -> None:
    spoil, said = REFUSED[case]
    shutil.copytree(saved / "peft", tmp_path / "peft")
    spoil(tmp_path / "peft")
    with pytest.raises(CheckpointError, match=said) as caught:
        import_peft(tmp_path / "peft", tmp_path / "ckpt", hf_dir=saved / "base")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        (
            AdapterDescription(4, 8.0, 0.0, TARGETS),
            r"needs rank 8 \(its projections have an A each, .*\), got peft.rank=4: set peft.rank=8 peft.alpha=16$",
        ),
        (
            AdapterDescription(8, 16.0, 0.0, ("linear_qkv",)),
            r"adapts linear_fc2, which peft.targets leaves out: set peft.targets=\[linear_qkv, linear_fc2\]",
        ),
    ],
    ids=["rank", "targets"],
)
def test_settings_that_cannot_hold_it_are_named(
    tmp_path: Path, saved: Path, mine: AdapterDescription, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        import_peft(saved / "peft", tmp_path / "ckpt", hf_dir=saved / "base", adapters=mine)
    assert not (tmp_path / "ckpt").exists()
