"""Adapters merged into their base: the sum in fp32 rounded once, everything else bit for bit, and a base that is found or asked for."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import updates, write_adapters, write_base
from hf_cases import KEPT, assert_same_bits, read_hf, write_hf

from asft_nemo import cli
from asft_nemo.checkpoint import dist_read, export_hf, import_hf, shards
from asft_nemo.checkpoint.adapters import TARGETS, AdapterDescription, adapter_description
from asft_nemo.checkpoint.base_weights import base_sample, nemo_base_sample, open_base
from asft_nemo.checkpoint.lora_merge import export_merged
from asft_nemo.errors import CheckpointError
from asft_nemo.model import read_model_spec

ALL = AdapterDescription(rank=4, alpha=6.0, dropout=0.05, targets=TARGETS)
SOME = AdapterDescription(rank=4, alpha=6.0, dropout=0.0, targets=("linear_qkv", "linear_fc2"))


def worst(
    found: dict[str, torch.Tensor], base: dict[str, torch.Tensor], update: dict[str, torch.Tensor]
) -> float:
    """The largest error of a merged weight, relative to its largest number."""
    exact = {name: base[name].double() + value for name, value in update.items()}
    return max(
        float((found[name].double() - value).abs().max() / value.abs().max()) for name, value in exact.items()
    )


@pytest.mark.parametrize("block_bytes", [64 * 2**20, 300], ids=["big", "small"])
@pytest.mark.parametrize("adapters", [ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_adapted_weights_are_the_sum_and_the_others_the_same_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tied: bool,
    adapters: AdapterDescription,
    block_bytes: int,
) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", block_bytes)
    base = write_base(tmp_path / "base", tied=tied)
    tensors = write_adapters(tmp_path / "ckpt", tmp_path / "base", adapters=adapters)
    told: list[tuple[int, int, str]] = []
    report = export_merged(
        tmp_path / "ckpt", tmp_path / "out", max_shard_bytes=40_000, progress=lambda *what: told.append(what)
    )
    found, update = read_hf(tmp_path / "out"), updates(tensors, adapters)
    assert set(found) == set(base)
    assert worst(found, base, update) < 3e-7
    assert worst(base, base, update) > 0.1  # without the update it is another weight
    rest = base.keys() - update.keys()
    assert_same_bits({name: found[name] for name in rest}, {name: base[name] for name in rest})
    files = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert {name for name in files if ".safetensors" not in name} == KEPT
    for name in KEPT:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert report.shards > 1
    assert (report.nbytes, report.nbytes) == told[-1][:2]


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    """bf16 base, bf16 adapters: every number is within half a unit in the last place of the exact sum; fp32 on request."""
    base = write_base(tmp_path / "base", torch.bfloat16)
    tensors = write_adapters(tmp_path / "ckpt", tmp_path / "base", adapters=ALL, dtype=torch.bfloat16)
    report = export_merged(tmp_path / "ckpt", tmp_path / "out")
    assert report.dtype == torch.bfloat16
    found, update = read_hf(tmp_path / "out"), updates(tensors, ALL)
    for name, value in update.items():
        exact = base[name].double() + value
        assert ((found[name].double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all(), name
    wide = export_merged(tmp_path / "ckpt", tmp_path / "wide", dtype="fp32")
    found = read_hf(tmp_path / "wide")
    assert wide.dtype == torch.float32
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert worst(found, base, update) < 3e-7
    assert torch.equal(found["model.norm.weight"], base["model.norm.weight"].float())
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"


def test_the_base_is_found_in_either_form(tmp_path: Path, edit_config: Any) -> None:
    """Given, in the run's folder, or where the run found it: the same directory, bit for bit."""
    write_base(tmp_path / "base")
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_2"
    write_adapters(checkpoint, tmp_path / "base", adapters=ALL)
    (run / "checkpoints" / "latest").symlink_to("step_2")
    export_merged(checkpoint, tmp_path / "recorded")
    import_hf(tmp_path / "base", run / "base")
    shutil.move(tmp_path / "base", tmp_path / "moved")
    export_merged(run / "checkpoints" / "latest", tmp_path / "beside")
    export_merged(checkpoint, tmp_path / "hf", base_dir=tmp_path / "moved")
    shutil.move(run / "base", tmp_path / "nemo")
    export_merged(checkpoint, tmp_path / "dist", base_dir=tmp_path / "nemo")
    expected = read_hf(tmp_path / "recorded")
    for name in ("beside", "hf", "dist"):
        assert_same_bits(read_hf(tmp_path / name), expected)
    with pytest.raises(
        CheckpointError,
        match=r"base is not beside it \(.*base, when it was trained, is not here or another model\): pass",
    ):
        export_merged(checkpoint, tmp_path / "out")
    write_base(tmp_path / "base")
    edit_config(tmp_path / "base", rope_theta=5e5)  # another model by now
    with pytest.raises(CheckpointError, match="base is not beside it"):
        export_merged(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_interrupted_goes_on(tmp_path: Path) -> None:
    """The second start writes the files that were missing, and the result is that of a straight one; other adapters start anew."""
    write_base(tmp_path / "base")
    write_adapters(tmp_path / "ckpt", tmp_path / "base", adapters=ALL)
    export_merged(tmp_path / "ckpt", tmp_path / "straight", max_shard_bytes=6_000)

    def start(progress: Any) -> None:
        export_merged(tmp_path / "ckpt", tmp_path / "out", max_shard_bytes=6_000, progress=progress)

    def interrupt(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            start(interrupt)
        assert not (tmp_path / "out").exists()
    told: list[str] = []
    start(lambda done, total, what: told.append(what))
    assert told.count("complete before") > 5
    assert_same_bits(read_hf(tmp_path / "out"), read_hf(tmp_path / "straight"))
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        start(interrupt)
    adapter = tmp_path / "ckpt" / "context" / "adapter.json"
    adapter.write_text(adapter.read_text().replace("6.0", "7.0"))
    told.clear()
    start(lambda done, total, what: told.append(what))
    assert "complete before" not in told
    assert not torch.equal(
        *(read_hf(tmp_path / name)["model.layers.0.mlp.up_proj.weight"] for name in ("out", "straight"))
    )


def test_extra_state_is_dropped(tmp_path: Path) -> None:
    """Transformer Engine leaves `_extra_state` objects beside its weights: they are no weights."""
    write_base(tmp_path / "base")
    keys = ("module.decoder.layers.mlp.linear_fc1.adapter.linear_in._extra_state/shard_0_3",)
    for name, objects in (("with", keys), ("without", ())):
        write_adapters(tmp_path / name, tmp_path / "base", adapters=ALL, objects=objects)
        export_merged(tmp_path / name, tmp_path / f"{name}_out")
    assert_same_bits(read_hf(tmp_path / "with_out"), read_hf(tmp_path / "without_out"))


def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path: Path, edit_config) -> None:
    base = tmp_path / "base"
    write_base(base)
    import_hf(base, tmp_path / "whole")
    checkpoint = tmp_path / "ckpt"
    write_adapters(checkpoint, base, adapters=ALL)
    description = (checkpoint / "context" / "adapter.json").read_text()
    other = tmp_path / "other"
    write_base(other)
    edit_config(other, rope_theta=5e5)

    def refused(said: str, source: Path = checkpoint, **more: object) -> None:
        with pytest.raises(CheckpointError, match=said) as caught:
            export_merged(source, tmp_path / "out", **more)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    refused("holds a whole model, not adapters", tmp_path / "whole")
    refused(r"other is not the base of these adapters \(rope_theta is 500000.0", base_dir=other)
    refused("holds no weights/", base)
    with pytest.raises(CheckpointError, match="choose --adapters merge or --adapters peft"):
        export_hf(checkpoint, tmp_path / "out")
    shutil.move(checkpoint / "context" / "hf", tmp_path / "files")
    refused(r"does not hold the base model's files .*: pass --base HF_DIR")
    export_merged(checkpoint, tmp_path / "fine", base_dir=base)
    shutil.move(tmp_path / "files", checkpoint / "context" / "hf")
    for text, said in (
        ("{", "is malformed"),
        (description.replace("linear_fc2", "linear_fc9"), "cannot read: upgrade asft_nemo"),
        (description.replace('"rank": 4', '"rank": 2'), r"is \[3, 4, 32\] and should be \[3, 2, 32\]"),
    ):
        (checkpoint / "context" / "adapter.json").write_text(text)
        refused(said)
    (checkpoint / "context" / "adapter.json").write_text(description)
    assert adapter_description(checkpoint) == ALL
    shutil.rmtree(checkpoint / "weights")
    refused("holds no weights/")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """export says what it wants of adapters, writes both forms, and inspect tells all three apart."""
    base = write_base(tmp_path / "base")
    write_adapters(tmp_path / "ckpt", tmp_path / "base", adapters=ALL)
    given = [str(tmp_path / "ckpt"), str(tmp_path / "out")]
    assert cli.main(["export", *given]) == 2
    assert "choose --adapters merge or --adapters peft" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main(["export", *given, "--adapters", "merge", "--max-shard-size", "40KB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tensors"] == len(base)
    peft = [str(tmp_path / "ckpt"), str(tmp_path / "peft"), "--base", str(tmp_path / "base")]
    assert cli.main(["export", *peft, "--adapters", "peft"]) == 0
    assert capsys.readouterr().out.startswith("wrote adapters of 42 tensors")
    kinds = {}
    for name in ("ckpt", "out", "peft"):
        assert cli.main(["inspect", str(tmp_path / name), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        kinds[name] = (found["kind"], found["adapters"] and found["adapters"]["rank"])
    assert kinds == {"ckpt": ("nemo adapters", 4), "out": ("huggingface", None), "peft": ("peft adapters", 4)}


@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_another_base_of_the_same_architecture_is_refused(tmp_path: Path, where: str) -> None:
    """A checkpoint records a sample of its base: the same for the Hugging Face directory and its import in any dtype, another for other weights."""
    tensors = write_base(tmp_path / "base", torch.bfloat16)
    write_adapters(tmp_path / "ckpt", tmp_path / "base", adapters=ALL)
    import_hf(tmp_path / "base", tmp_path / "nemo", dtype="fp32")
    (tmp_path / "ckpt" / "context" / "adapter.json").write_text(
        ALL.to_json(base_sample=nemo_base_sample(tmp_path / "nemo"))
    )
    assert adapter_description(tmp_path / "ckpt") == ALL
    export_merged(tmp_path / "ckpt", tmp_path / "one")
    export_merged(tmp_path / "ckpt", tmp_path / "two", base_dir=tmp_path / "nemo")
    assert_same_bits(read_hf(tmp_path / "one"), read_hf(tmp_path / "two"))
    other = {name: tensor.clone() for name, tensor in tensors.items()}
    other[where][0] += 1
    write_hf(tmp_path / "other", dtype=torch.bfloat16, tensors=other)
    with pytest.raises(
        CheckpointError, match=r"other does not hold the weights that the adapters of .* were trained on"
    ):
        export_merged(tmp_path / "ckpt", tmp_path / "three", base_dir=tmp_path / "other")
    assert not (tmp_path / "three").exists()


def test_the_sample_of_a_base_reads_its_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint of adapters waits for it: of a base of 145 GB whole chunks would be 56."""
    write_base(tmp_path / "base", torch.bfloat16)
    import_hf(tmp_path / "base", tmp_path / "nemo")
    whole: list[object] = []
    monkeypatch.setattr(dist_read, "_check_sums", whole.append)
    with closing(open_base(tmp_path / "nemo", spec=read_model_spec(tmp_path / "base"))) as base:
        sample = base_sample(base, read_model_spec(tmp_path / "base"))
    assert whole  # as an export of merged weights does
    whole.clear()
    assert nemo_base_sample(tmp_path / "nemo") == sample
    assert not whole
