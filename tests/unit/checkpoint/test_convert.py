"""Hugging Face in, Hugging Face out: bit for bit, whatever the sharding, the block size and the dtype."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hf_cases import (
    FFN,
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KEPT,
    LAYERS,
    VARIANTS,
    VOCAB,
    assert_same_bits,
    config_of,
    read_hf,
    shapes_of,
    write_hf,
    write_variant,
)
from safetensors.torch import save_file

from asft_nemo.checkpoint import convert, export_hf, import_hf, shards
from asft_nemo.checkpoint.hf_files import read_origin
from asft_nemo.errors import CheckpointError, UserError


def files_under(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("block_bytes", [convert.BLOCK_BYTES, 200], ids=["big", "small"])
def test_round_trip_is_bit_exact(tmp_path, monkeypatch, tied, dtype, block_bytes):
    monkeypatch.setattr(convert, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(shards, "BLOCK_BYTES", block_bytes)
    tensors = write_hf(tmp_path / "hf", tied=tied, dtype=dtype, files=4)
    imported = import_hf(tmp_path / "hf", tmp_path / "ckpt")
    exported = export_hf(tmp_path / "ckpt", tmp_path / "back", max_shard_bytes=40_000)

    assert_same_bits(read_hf(tmp_path / "back"), tensors)
    assert exported.shards >= 2
    assert imported.nbytes == exported.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert imported.dtype == exported.dtype == dtype
    for name in KEPT:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name
    weights = {name for name in files_under(tmp_path / "back") if ".safetensors" in name}
    assert files_under(tmp_path / "back") - weights == KEPT
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == exported.nbytes
    for file_name in set(index["weight_map"].values()):
        assert (tmp_path / "back" / file_name).stat().st_size < 40_000 + 4_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back_bit_for_bit(tmp_path, variant, dtype):
    config = config_of(variant, dtype=dtype)
    tensors = write_variant(tmp_path / "hf", config, files=3)
    report = import_hf(tmp_path / "hf", tmp_path / "ckpt")
    assert (report.family, report.num_tensors) == (config["model_type"], len(tensors))
    assert report.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    export_hf(tmp_path / "ckpt", tmp_path / "back", max_shard_bytes=40_000)
    assert_same_bits(read_hf(tmp_path / "back"), tensors)
    for name in KEPT:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variants_tensors_are_checked_by_name_and_shape(tmp_path, variant):
    """One tensor of each kind is left out; then a tensor of another variant is too many, or one is of another shape."""
    config = config_of(variant)
    tensors = write_variant(tmp_path / "whole", config)
    for name in (name for name in tensors if ".layers." not in name or ".layers.1." in name):
        write_variant(tmp_path / "hf", config, tensors={n: t for n, t in tensors.items() if n != name})
        with pytest.raises(CheckpointError, match=rf"missing: {name}\)"):
            import_hf(tmp_path / "hf", tmp_path / "ckpt")
        shutil.rmtree(tmp_path / "hf")
    others = {name for other in VARIANTS for name in shapes_of(config_of(other)) if ".layers.1." in name}
    for number, name in enumerate(sorted(others - set(tensors))):
        write_variant(tmp_path / f"more{number}", config, tensors=tensors | {name: torch.ones(HIDDEN)})
        with pytest.raises(CheckpointError, match=f"left over: {name}"):
            import_hf(tmp_path / f"more{number}", tmp_path / "ckpt")
    name = "model.layers.2.self_attn." + ("q_norm.weight" if "qwen3" in variant else "k_proj.weight")
    write_variant(tmp_path / "wrong", config, tensors=tensors | {name: tensors[name][1:].contiguous()})
    with pytest.raises(CheckpointError, match=f"{name} has shape"):
        import_hf(tmp_path / "wrong", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_the_library_of_hugging_face_loads_the_export_and_computes_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_hf(tmp_path / "hf", dtype=torch.float32, files=2)
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    tokens = torch.arange(20).reshape(2, 10)
    both = []
    for name in ("hf", "back"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        model.model.norm.weight.data.nan_to_num_(posinf=1.0)
        both.append(model(tokens).logits)
    assert torch.isfinite(both[0]).all()
    assert torch.equal(*both)


def test_on_disk_it_is_what_megatron_expects(tmp_path):
    """Read back by torch alone, and compared with the reshapes written out."""
    tensors = write_hf(tmp_path / "hf", dtype=torch.float32)
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    attention, mlp = "module.decoder.layers.self_attention.", "module.decoder.layers.mlp."
    qkv_rows = (HEADS + 2 * GROUPS) * HEAD_DIM
    shapes = {
        "module.embedding.word_embeddings.weight": (VOCAB, HIDDEN),
        attention + "linear_qkv.layer_norm_weight": (LAYERS, HIDDEN),
        attention + "linear_qkv.weight": (LAYERS, qkv_rows, HIDDEN),
        attention + "linear_qkv.bias": (LAYERS, qkv_rows),
        attention + "linear_proj.weight": (LAYERS, HIDDEN, HEADS * HEAD_DIM),
        mlp + "linear_fc1.layer_norm_weight": (LAYERS, HIDDEN),
        mlp + "linear_fc1.weight": (LAYERS, 2 * FFN, HIDDEN),
        mlp + "linear_fc2.weight": (LAYERS, HIDDEN, FFN),
        "module.decoder.final_layernorm.weight": (HIDDEN,),
        "module.output_layer.weight": (VOCAB, HIDDEN),
    }
    loaded = {key: torch.zeros(shape) for key, shape in shapes.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "ckpt" / "weights", no_dist=True)
    for layer in range(LAYERS):
        of = {name: tensors[f"model.layers.{layer}.{name}"] for name in layer_names()}
        for kind in ("weight", "bias"):
            rest = (HIDDEN,) if kind == "weight" else ()
            parts = [of[f"self_attn.{n}_proj.{kind}"].reshape(GROUPS, -1, HEAD_DIM, *rest) for n in "qkv"]
            expected = torch.cat(parts, dim=1).reshape(qkv_rows, *rest)
            assert torch.equal(loaded[f"{attention}linear_qkv.{kind}"][layer], expected)
        expected = torch.cat([of["mlp.gate_proj.weight"], of["mlp.up_proj.weight"]])
        assert torch.equal(loaded[mlp + "linear_fc1.weight"][layer], expected)
        assert torch.equal(loaded[attention + "linear_proj.weight"][layer], of["self_attn.o_proj.weight"])
        assert torch.equal(
            loaded[mlp + "linear_fc1.layer_norm_weight"][layer], of["post_attention_layernorm.weight"]
        )
    stored = dcp.FileSystemReader(tmp_path / "ckpt" / "weights").read_metadata().state_dict_metadata
    assert {key for key in stored if "_extra_state" not in key} == set(shapes)
    assert (
        json.loads((tmp_path / "ckpt/weights/metadata.json").read_text())["sharded_backend"] == "torch_dist"
    )
    assert torch.load(tmp_path / "ckpt/weights/common.pt", weights_only=True)["content_metadata"]
    assert files_under(tmp_path / "ckpt" / "context" / "hf") == KEPT


def layer_names():
    weights = [f"self_attn.{n}_proj.{kind}" for n in "qkv" for kind in ("weight", "bias")]
    weights += ["self_attn.o_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight"]
    return [*weights, "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]


def test_an_export_is_loaded_from_its_own_weights(tmp_path):
    """The folder that a merged model was saved into may still hold the adapters' files, and transformers goes by these."""
    write_hf(tmp_path / "hf")
    described = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "elsewhere")}
    (tmp_path / "hf" / "adapter_config.json").write_text(json.dumps(described))
    save_file({"a": torch.ones(1)}, tmp_path / "hf" / "adapter_model.safetensors")
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back", base_dir=tmp_path / "hf")
    assert files_under(tmp_path / "ckpt" / "context" / "hf") == KEPT
    assert files_under(tmp_path / "back") == KEPT | {"model.safetensors"}


def test_dtype_is_cast_on_the_way_in_and_the_source_dtype_comes_back(tmp_path):
    tensors = write_hf(tmp_path / "hf", dtype=torch.bfloat16)
    report = import_hf(tmp_path / "hf", tmp_path / "ckpt", dtype="fp32")
    assert report.dtype == torch.float32
    assert report.nbytes == 2 * sum(tensor.nbytes for tensor in tensors.values())
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_bits(read_hf(tmp_path / "back"), tensors)
    export_hf(tmp_path / "ckpt", tmp_path / "wide", dtype="fp32")
    assert_same_bits(read_hf(tmp_path / "wide"), {name: tensor.float() for name, tensor in tensors.items()})
    before = json.loads((tmp_path / "hf" / "config.json").read_text())
    after = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert after == before | {"torch_dtype": "float32"}
    with pytest.raises(UserError, match="dtype=int3 is not supported"):
        import_hf(tmp_path / "hf", tmp_path / "other", dtype="int3")


def test_a_tensor_of_another_dtype_keeps_it(tmp_path):
    tensors = write_hf(tmp_path / "first")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    write_hf(tmp_path / "hf", tensors=tensors)
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    origin = read_origin(tmp_path / "ckpt")
    assert origin is not None
    assert origin.source_dtype_exceptions == {"decoder.final_layernorm.weight": "float32"}
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_bits(read_hf(tmp_path / "back"), tensors)

    tensors["model.layers.1.self_attn.k_proj.weight"] = tensors[
        "model.layers.1.self_attn.k_proj.weight"
    ].float()
    write_hf(tmp_path / "mixed", tensors=tensors)
    with pytest.raises(
        CheckpointError, match=r"several dtypes \(bfloat16, float32\): choose one with --dtype"
    ):
        import_hf(tmp_path / "mixed", tmp_path / "no")
    import_hf(tmp_path / "mixed", tmp_path / "yes", dtype=torch.float32)


def test_a_tied_head_stored_again_must_be_the_embedding(tmp_path):
    tensors = write_hf(tmp_path / "first", tied=True)
    doubled = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    write_hf(tmp_path / "doubled", tied=True, tensors=doubled)
    import_hf(tmp_path / "doubled", tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_bits(read_hf(tmp_path / "back"), tensors)
    doubled["lm_head.weight"][VOCAB - 1, 0] += 1
    write_hf(tmp_path / "differs", tied=True, tensors=doubled)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not model.embed_tokens.weight"):
        import_hf(tmp_path / "differs", tmp_path / "no")


def test_old_buffers_are_left_out(tmp_path):
    tensors = write_hf(tmp_path / "first")
    old = tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    write_hf(tmp_path / "hf", tensors=old)
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_bits(read_hf(tmp_path / "back"), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"missing: model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update({"model.layers.3.x": torch.ones(2)}), r"left over: model.layers.3.x"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"has shape \[31\] .* asks for \[32\]"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            "int8, a quantised checkpoint",
        ),
    ],
    ids=["missing", "left over", "shape", "quantised"],
)
def test_a_source_that_does_not_fit_its_config_is_refused(tmp_path, change, message):
    tensors = write_hf(tmp_path / "first")
    change(tensors)
    write_hf(tmp_path / "hf", tensors=tensors)
    with pytest.raises(CheckpointError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path, edit_config):
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    context = tmp_path / "ckpt" / "context" / "hf"
    for changes, message in (
        ({"num_hidden_layers": 4}, r"linear_qkv.layer_norm_weight has shape \[3, 32\] .* asks for \[4, 32\]"),
        ({"tie_word_embeddings": True}, "left over: module.output_layer.weight"),
        ({"vocab_size": 301}, r"word_embeddings.weight has shape \[300, 32\] .* asks for \[301, 32\]"),
    ):
        original = (context / "config.json").read_text()
        edit_config(context, **changes)
        with pytest.raises(CheckpointError, match=message):
            export_hf(tmp_path / "ckpt", tmp_path / "back")
        (context / "config.json").write_text(original)
    edit_config(context, vocab_size=299)  # a smaller vocabulary: the rest is padding
    export_hf(tmp_path / "ckpt", tmp_path / "cropped")
    assert read_hf(tmp_path / "cropped")["lm_head.weight"].shape == (299, HIDDEN)


def test_export_takes_the_other_files_from_the_base_when_told(tmp_path):
    tensors = write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    (tmp_path / "ckpt" / "context").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="pass --base HF_DIR"):
        export_hf(tmp_path / "ckpt", tmp_path / "back")
    export_hf(tmp_path / "ckpt", tmp_path / "back", base_dir=tmp_path / "hf")
    assert_same_bits(read_hf(tmp_path / "back"), tensors)
    assert (tmp_path / "back/config.json").read_bytes() == (tmp_path / "hf/config.json").read_bytes()


def test_paths_that_are_not_what_was_asked_for(tmp_path):
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="exists already"):
        import_hf(tmp_path / "hf", tmp_path / "ckpt")
    with pytest.raises(
        CheckpointError, match=r"holds no weights/ \(this looks like a Hugging Face one: import it\)"
    ):
        export_hf(tmp_path / "hf", tmp_path / "back")
    with pytest.raises(CheckpointError, match="is not a directory"):
        export_hf(tmp_path / "nothing", tmp_path / "back")
    with pytest.raises(CheckpointError, match="looks like a NeMo checkpoint"):
        import_hf(tmp_path / "ckpt", tmp_path / "back")


def test_progress_counts_every_byte_once(tmp_path):
    write_hf(tmp_path / "hf", files=3)
    calls = []
    report = import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=lambda *call: calls.append(call))
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1][0] == report.nbytes
    assert {total for _, total, _ in calls} == {report.nbytes}
    calls.clear()
    export_hf(tmp_path / "ckpt", tmp_path / "back", progress=lambda *call: calls.append(call))
    assert calls[-1][:2] == (report.nbytes, report.nbytes)
    assert {what for _, _, what in calls} == set(read_hf(tmp_path / "back"))


@pytest.mark.parametrize(("convert_again", "name"), [(import_hf, "hf"), (export_hf, "ckpt")])
def test_a_full_disk_leaves_no_target(tmp_path, convert_again, name):
    """The kernel refuses to let a file grow past the limit, as it does on a full disk. With room the same call ends right."""
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    source = tmp_path / name
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .* \(File too large"):
            convert_again(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(os.listdir(tmp_path)) == [".out.partial", "ckpt", "hf"]
    convert_again(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["ckpt", "hf", "out"]


def test_a_killed_import_can_be_started_again(tmp_path):
    tensors = write_hf(tmp_path / "hf")
    script = f"""
        import os, signal
        from asft_nemo.checkpoint import import_hf
        def progress(done, total, what):
            if done > total // 2:
                os.kill(os.getpid(), signal.SIGKILL)
        import_hf({str(tmp_path / "hf")!r}, {str(tmp_path / "ckpt")!r}, progress=progress)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == [".ckpt.partial", "hf"]
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_bits(read_hf(tmp_path / "back"), tensors)


def test_neither_nemo_nor_megatron_is_imported():
    script = "import sys, asft_nemo.checkpoint; print([m for m in ('nemo', 'megatron') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], timeout=240, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


def test_weights_in_another_format_are_not_read(tmp_path):
    write_hf(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="convert the weights to safetensors first"):
        import_hf(tmp_path / "hf", tmp_path / "ckpt")
    save_file({"a": torch.ones(1)}, tmp_path / "hf" / "other.safetensors")
    with pytest.raises(CheckpointError, match="holds neither"):
        import_hf(tmp_path / "hf", tmp_path / "ckpt")
