"""Mappings are lists of row segments: they agree with the reshapes they stand for, and invert exactly."""

import pytest
import torch
from hf_cases import LAYERS, VARIANTS, config_of, shapes_of
from hypothesis import given
from hypothesis import strategies as st

from asft_nemo.checkpoint.families import hf_tensors, mappings_of
from asft_nemo.checkpoint.mapping import (
    GatedMLP,
    InterleavedQKV,
    TensorMapping,
    hf_runs,
    megatron_runs,
    row_blocks,
)
from asft_nemo.model import model_spec, parameter_count


def gather(runs, tensors, rows, row_shape):
    block = torch.full((rows, *row_shape), -1)
    for run in runs:
        block[run.into : run.into + run.rows] = tensors[run.name][run.start : run.start + run.rows]
    return block


def numbered(mapping: TensorMapping) -> dict[str, torch.Tensor]:
    """Hugging Face tensors in which every number is another one."""
    tensors, first = {}, 0
    for name, shape in mapping.hf_shapes().items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + count).reshape(shape)
        first += count
    return tensors


@st.composite
def qkv(draw):
    groups = draw(st.integers(1, 4))
    return InterleavedQKV(
        megatron="qkv",
        query="q",
        key="k",
        value="v",
        num_attention_heads=groups * draw(st.integers(1, 4)),
        num_query_groups=groups,
        head_dim=draw(st.integers(1, 5)),
        row_shape=draw(st.sampled_from([(), (3,)])),
    )


@given(mapping=qkv())
def test_qkv_is_megatrons_interleaving_by_group(mapping):
    tensors = numbered(mapping)
    groups = mapping.num_query_groups
    stacked = torch.cat(
        [
            tensors["q"].reshape(groups, -1, mapping.head_dim, mapping.row_numel),
            tensors["k"].reshape(groups, 1, mapping.head_dim, mapping.row_numel),
            tensors["v"].reshape(groups, 1, mapping.head_dim, mapping.row_numel),
        ],
        dim=1,
    ).reshape(mapping.shape)
    ours = gather(hf_runs(mapping.segments(), 0, mapping.rows), tensors, mapping.rows, mapping.row_shape)
    assert torch.equal(ours, stacked)


def test_the_gate_is_the_first_half():
    mapping = GatedMLP(megatron="fc1", gate="gate", up="up", ffn_hidden_size=3, row_shape=(2,))
    tensors = numbered(mapping)
    ours = gather(hf_runs(mapping.segments(), 0, 6), tensors, 6, (2,))
    assert torch.equal(ours, torch.cat([tensors["gate"], tensors["up"]]))


@given(mapping=qkv(), data=st.data())
def test_any_rows_can_be_read_both_ways(mapping, data):
    tensors = numbered(mapping)
    whole = gather(hf_runs(mapping.segments(), 0, mapping.rows), tensors, mapping.rows, mapping.row_shape)
    start = data.draw(st.integers(0, mapping.rows - 1))
    stop = data.draw(st.integers(start + 1, mapping.rows))
    part = gather(hf_runs(mapping.segments(), start, stop), tensors, stop - start, mapping.row_shape)
    assert torch.equal(part, whole[start:stop])
    for name, tensor in tensors.items():
        low = data.draw(st.integers(0, len(tensor) - 1))
        high = data.draw(st.integers(low + 1, len(tensor)))
        runs = megatron_runs(mapping.segments(), name, low, high, megatron="qkv")
        back = gather(runs, {"qkv": whole}, high - low, mapping.row_shape)
        assert torch.equal(back, tensor[low:high])


@given(rows=st.integers(1, 50), row_bytes=st.integers(1, 9), limit=st.integers(1, 40))
def test_blocks_cover_every_row_once_within_the_limit(rows, row_bytes, limit):
    blocks = list(row_blocks(rows, row_bytes, limit))
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(rows))
    assert all((stop - start) * row_bytes <= max(limit, row_bytes) for start, stop in blocks)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_names_every_tensor_of_transformers_model(variant):
    transformers = pytest.importorskip("transformers")
    config = config_of(variant)
    rest = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(config["model_type"], **rest)
        )
    theirs = {name: tuple(value.shape) for name, value in model.named_parameters()}
    spec = model_spec(config)
    assert {tensor.name: tensor.shape for tensor in hf_tensors(spec)} == theirs == shapes_of(config)
    numbers = sum(torch.Size(m.shape).numel() * (LAYERS if m.per_layer else 1) for m in mappings_of(spec))
    assert numbers == sum(torch.Size(shape).numel() for shape in theirs.values()) == parameter_count(spec)
