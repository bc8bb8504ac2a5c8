"""Verification sees a single bit, and counts what differs."""

import math

import pytest
import torch
from hf_cases import bits, write_hf

from asft_nemo.checkpoint import TensorDifference, import_hf, verify
from asft_nemo.errors import CheckpointError


@pytest.mark.parametrize("tied", [False, True])
def test_an_import_is_identical(tmp_path, tied):
    tensors = write_hf(tmp_path / "hf", tied=tied, files=2)
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    calls = []
    report = verify(tmp_path / "ckpt", tmp_path / "hf", progress=lambda *call: calls.append(call))
    assert report.identical
    assert report.num_tensors == len(tensors)
    assert calls[-1][0] == calls[-1][1] == report.nbytes == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.2.self_attn.v_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ],
)
def test_one_flipped_bit_is_found_where_it_is(tmp_path, name):
    tensors = write_hf(tmp_path / "hf", dtype=torch.float32)
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    bits(tensors[name])[-4] ^= 1  # the lowest bit of the last number
    write_hf(tmp_path / "changed", dtype=torch.float32, tensors=tensors)
    report = verify(tmp_path / "ckpt", tmp_path / "changed")
    assert [(d.name, d.numbers, d.total) for d in report.differences] == [(name, 1, tensors[name].numel())]
    assert 0 < report.differences[0].max_difference < 1e-6


def test_differences_are_measured(tmp_path):
    tensors = write_hf(tmp_path / "hf", dtype=torch.float32)
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    tensors["model.layers.0.input_layernorm.weight"][:2] += torch.tensor([0.5, -2.0])
    tensors["model.norm.weight"][1] = 0.0  # was -0.0: another bit, no other number
    tensors["lm_head.weight"][0, 0] = float("nan")
    write_hf(tmp_path / "changed", dtype=torch.float32, tensors=tensors)
    found = {
        difference.name: difference
        for difference in verify(tmp_path / "ckpt", tmp_path / "changed").differences
    }
    norm = found.pop("model.layers.0.input_layernorm.weight")
    assert (norm.numbers, norm.total) == (2, 32)
    assert norm.max_difference == pytest.approx(2.0, abs=1e-6)
    assert found.pop("model.norm.weight") == TensorDifference("model.norm.weight", 1, 32, 0.0)
    assert math.isnan(found.pop("lm_head.weight").max_difference)
    assert not found


def test_a_wider_checkpoint_is_compared_as_it_would_be_exported(tmp_path):
    write_hf(tmp_path / "hf", dtype=torch.bfloat16)
    import_hf(tmp_path / "hf", tmp_path / "ckpt", dtype="fp32")
    assert verify(tmp_path / "ckpt", tmp_path / "hf").identical


def test_checkpoints_of_other_shapes_cannot_be_compared(tmp_path, edit_config):
    tensors = write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    fewer = {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name}
    write_hf(tmp_path / "fewer", tensors=fewer)
    edit_config(tmp_path / "fewer", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"has shape \[3, 32\] where config.json asks for \[2, 32\]"):
        verify(tmp_path / "ckpt", tmp_path / "fewer")
