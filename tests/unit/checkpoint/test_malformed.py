"""Files that are well written and say nonsense: metadata of a checkpoint, headers and lists of safetensors, weights in fp64."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import tensors_of, write_hf
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from asft_nemo.checkpoint import import_hf
from asft_nemo.checkpoint.dist_metadata import read_metadata
from asft_nemo.checkpoint.safetensors_io import SafetensorsReader, read_header
from asft_nemo.errors import CheckpointError


def metadata() -> Metadata:
    """Of one tensor of two rows in one chunk."""
    size = torch.Size([2])
    tensor = TensorStorageMetadata(
        properties=TensorProperties(dtype=torch.float32),
        size=size,
        chunks=[ChunkStorageMetadata(offsets=torch.Size([0]), sizes=size)],
    )
    return Metadata(
        state_dict_metadata={"a": tensor},
        storage_data={MetadataIndex("a", torch.Size([0])): _StorageInfo("file", 0, 8)},
    )


def numbered(found: Metadata) -> Any:
    found.state_dict_metadata = {1: found.state_dict_metadata["a"]}  # type: ignore[dict-item]
    return found


def without_dtype(found: Metadata) -> Any:
    found.state_dict_metadata["a"].properties.dtype = "float32"  # type: ignore[union-attr]
    return found


def of_two_dims(found: Metadata) -> Any:
    found.state_dict_metadata["a"].chunks[0].offsets = torch.Size([0, 0])  # type: ignore[union-attr]
    return found


def nowhere(found: Metadata) -> Any:
    (place,) = found.storage_data.values()
    place.offset = "0"  # type: ignore[assignment]
    return found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (numbered, "a tensor is called 1"),
        (without_dtype, "a has no dtype or shape"),
        (of_two_dims, "a has no dtype or shape"),
        (nowhere, "a chunk has no place"),
        (lambda found: {"a": 1}, "it describes no checkpoint"),
    ],
)
def test_metadata_that_describes_no_checkpoint(
    tmp_path: Path, change: Callable[[Metadata], Any], said: str
) -> None:
    file = tmp_path / ".metadata"
    file.write_bytes(pickle.dumps(metadata()))
    assert list(read_metadata(tmp_path).state_dict_metadata) == ["a"]
    file.write_bytes(pickle.dumps(change(metadata())))
    with pytest.raises(CheckpointError) as refused:
        read_metadata(tmp_path)
    assert str(refused.value).startswith(f"{file} cannot be read (TypeError(")
    assert said in str(refused.value)
    assert str(refused.value).endswith(": copy the checkpoint again")


def test_metadata_that_python_3_13_wrote(tmp_path: Path) -> None:
    """torch notes the folder there, whose class this Python alone calls by the name of a module that others have not."""
    found = metadata()
    found.storage_meta = StorageMeta(checkpoint_id=tmp_path)
    written = pickle.dumps(found, protocol=2)
    other = written.replace(b"cpathlib\nPosixPath", b"cpathlib._local\nPosixPath")
    assert other != written or b"cpathlib._local\nPosixPath" in written
    (tmp_path / ".metadata").write_bytes(other)
    assert list(read_metadata(tmp_path).state_dict_metadata) == ["a"]


@pytest.mark.parametrize("header", [b"[]", b"3", b"{", b'"a"'])
def test_a_header_that_is_no_object(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError) as refused:
        read_header(file)
    assert str(refused.value).startswith(f"{file} has a malformed header (")


@pytest.mark.parametrize("weight_map", [{"a": 3}, {"a": None}, [], None])
def test_a_list_of_files_that_names_none(tmp_path: Path, weight_map: Any) -> None:
    write_hf(tmp_path / "hf", files=2)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        SafetensorsReader(tmp_path / "hf")


def test_weights_in_fp64_are_refused(tmp_path: Path) -> None:
    tensors = {name: tensor.double() for name, tensor in tensors_of(tied=False, dtype=torch.float32).items()}
    write_hf(tmp_path / "hf", tensors=tensors)
    with pytest.raises(CheckpointError) as refused:
        import_hf(tmp_path / "hf", tmp_path / "out")
    assert "is float64, which no checkpoint is written in: save the model in fp32 first" in str(refused.value)


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_plain_weights_that_would_be_quantised_when_loaded_are_refused(
    tmp_path: Path, edit_config: Callable[..., None], field: str
) -> None:
    write_hf(tmp_path / "hf")
    edit_config(tmp_path / "hf", **{field: {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    with pytest.raises(CheckpointError, match=f"has a {field}, by which .* remove that field"):
        import_hf(tmp_path / "hf", tmp_path / "out")
    edit_config(tmp_path / "hf", **{field: None})
    import_hf(tmp_path / "hf", tmp_path / "out")
