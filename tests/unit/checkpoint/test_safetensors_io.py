"""Our reader and writer against the safetensors library, and against files that are broken on purpose."""

import json
import struct

import pytest
import torch
from hf_cases import assert_same_bits, write_hf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from asft_nemo.checkpoint.safetensors_io import (
    DTYPES,
    SafetensorsReader,
    byte_view,
    header_bytes,
    index_text,
    plan_shards,
    read_header,
)
from asft_nemo.errors import CheckpointError


def random_tensor(dtype, shape):
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_reads_what_the_library_writes_and_the_other_way_round(tmp_path, dtype):
    tensors = {
        "a": random_tensor(dtype, (5, 3)),
        "b": random_tensor(dtype, (7,)),
        "empty": random_tensor(dtype, (0, 4)),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with SafetensorsReader(tmp_path) as reader:
        rows = torch.empty((2, 3), dtype=dtype)
        reader.read_rows("a", 3, rows)
        assert torch.equal(rows.view(torch.uint8), tensors["a"][3:].view(torch.uint8))
        assert reader.tensors["b"].shape == (7,)
        assert reader.tensors["b"].dtype == dtype

    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    data = header_bytes(described) + b"".join(byte_view(tensor) for tensor in tensors.values())
    (tmp_path / "ours.safetensors").write_bytes(data)
    assert_same_bits(load_file(tmp_path / "ours.safetensors"), tensors)


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20), limit=st.integers(1, 60))
def test_shards_keep_order_and_limit(sizes, limit):
    named = {f"t{i}": size for i, size in enumerate(sizes)}
    shards = plan_shards(named, limit)
    assert [name for names in shards.values() for name in names] == list(named)
    for names in shards.values():
        assert len(names) == 1 or sum(named[name] for name in names) <= limit
    if len(shards) == 1:
        assert list(shards) == ["model.safetensors"]
    else:
        index = json.loads(index_text(shards, sum(sizes)))
        assert {file: [n for n in named if index["weight_map"][n] == file] for file in shards} == shards


def broken_header(path, change):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["a"].update(shape=[5, 4]), "'a' claims 60 bytes where its shape needs 80"),
        (lambda h: h["a"].update(dtype="F4"), "'a' is malformed or of an unsupported dtype"),
        (lambda h: h["a"].pop("data_offsets"), "'a' is malformed"),
        (lambda h: h["a"].update(shape=[-5, -3]), "shape needs|malformed|claims"),
        (lambda h: h.pop("a"), "overlap or leave a gap at byte 0"),
        (lambda h: h.pop("b"), "where its header names 60"),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path, change, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(header_bytes({"a": (torch.float32, (5, 3)), "b": (torch.float32, (2,))}) + bytes(4 * 17))
    assert set(read_header(path)) == {"a", "b"}
    broken_header(path, change)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(5, 3)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"truncated|not a complete safetensors file|malformed header"):
        read_header(path)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(5, 3)}, path)
    with SafetensorsReader(tmp_path) as reader:
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(CheckpointError, match="ends too early"):
            reader.read_rows("a", 0, torch.empty(5, 3))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda m: m.update({"model.norm.weight": "../../secret.safetensors"}),
            "points to '../../secret.safetensors'",
        ),
        (lambda m: m.update({"model.norm.weight": "/etc/passwd"}), "points to '/etc/passwd'"),
        (
            lambda m: m.update({"model.norm.weight": "absent.safetensors"}),
            "names absent.safetensors, which is missing",
        ),
        (lambda m: m.update({"extra": "model-00001-of-00002.safetensors"}), r"disagree on .* \(extra\)"),
        (lambda m: m.pop("model.norm.weight"), r"disagree on .* \(model.norm.weight\)"),
        (lambda m: m.update({"model.norm.weight": 3}), "is not a weight index"),
    ],
)
def test_an_index_that_does_not_describe_its_files_is_refused(tmp_path, edit, message):
    write_hf(tmp_path / "hf", files=2)
    path = tmp_path / "hf" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsReader(tmp_path / "hf")


def test_an_index_that_is_no_index_is_refused(tmp_path):
    for text in ("{", "[]", "{}", '{"weight_map": []}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="is not a weight index"):
            SafetensorsReader(tmp_path)
