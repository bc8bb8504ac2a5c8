"""Reading by rows agrees with torch's own reader at any chunk layout, and no pickle of a checkpoint is run."""

import os
import pickle
import shutil
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hf_cases import bits, write_hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from asft_nemo.checkpoint import import_hf
from asft_nemo.checkpoint.dist_read import DistReader
from asft_nemo.errors import CheckpointError


class GridPlanner(SavePlanner):
    """Saves each tensor as a grid of chunks, as the ranks of a parallel layout do together."""

    def __init__(self, tensors, grids):
        self.tensors = tensors
        self.chunks = {key: list(self.grid(tensors[key].shape, cuts)) for key, cuts in grids.items()}

    @staticmethod
    def grid(shape, cuts):
        sizes = [n // cut for n, cut in zip(shape, cuts, strict=True)]
        for index in (
            torch.cartesian_prod(*(torch.arange(cut) for cut in cuts)).reshape(-1, len(cuts)).tolist()
        ):
            offsets = [i * n for i, n in zip(index, sizes, strict=True)]
            yield ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))

    def set_up_planner(self, *args, **kwargs):
        pass

    def create_local_plan(self):
        return SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(key, chunk.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(chunk, TensorProperties(tensor.dtype), tensor.shape),
                )
                for key, tensor in self.tensors.items()
                for chunk in self.chunks[key]
            ]
        )

    def create_global_plan(self, plans):
        described = {
            key: TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, self.chunks[key])
            for key, tensor in self.tensors.items()
        }
        return plans, Metadata(state_dict_metadata=described)

    def finish_plan(self, plan):
        return plan

    def resolve_data(self, item):
        piece = self.tensors[item.index.fqn]
        chunk = item.tensor_data.chunk
        for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            piece = piece.narrow(dim, offset, size)
        return piece.contiguous()


@pytest.fixture(scope="module")
def grid_checkpoint(tmp_path_factory):
    """Tensors cut every way a layout may cut them; each is also read back by torch to be sure of the planner."""
    tensors = {
        "whole": torch.randn(6, 4),
        "rows": torch.randn(6, 4).bfloat16(),
        "columns": torch.randn(6, 4),
        "vector": torch.randn(6).double(),
        "layers": torch.randn(4, 6, 4),
        "layer pairs": torch.randn(4, 6, 4).half(),
        "everything": torch.randn(4, 6, 4),
        "layer vector": torch.randn(4, 6),
    }
    grids = {
        "whole": (1, 1),
        "rows": (3, 1),
        "columns": (1, 2),
        "vector": (2,),
        "layers": (4, 1, 1),
        "layer pairs": (2, 1, 1),
        "everything": (2, 3, 2),
        "layer vector": (4, 2),
    }
    directory = tmp_path_factory.mktemp("grid")
    dcp.save(
        {}, storage_writer=dcp.FileSystemWriter(directory), planner=GridPlanner(tensors, grids), no_dist=True
    )
    loaded = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    dcp.load(loaded, checkpoint_id=directory, no_dist=True)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())
    return directory, tensors


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows_of_any_layout(grid_checkpoint, data):
    directory, tensors = grid_checkpoint
    key = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[key]
    layer = data.draw(st.integers(0, 3)) if key.startswith(("layer", "every")) else None
    wanted = tensor if layer is None else tensor[layer]
    start = data.draw(st.integers(0, 5))
    stop = data.draw(st.integers(start + 1, 6))
    with DistReader(directory) as reader:
        assert reader.dtype(key) == tensor.dtype
        rows = torch.zeros_like(wanted[start:stop]).contiguous()
        reader.read_rows(key, layer, start, rows)
    assert torch.equal(bits(rows), bits(wanted[start:stop]))


def test_rows_beyond_the_tensor_are_an_error(grid_checkpoint):
    directory, _ = grid_checkpoint
    with DistReader(directory) as reader, pytest.raises(CheckpointError, match="do not cover rows 4 to 8"):
        reader.read_rows("whole", None, 4, torch.zeros(4, 4))


class Attack:
    """What a hostile pickle would hold."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_pickle_of_the_metadata_is_run(grid_checkpoint, tmp_path):
    """Ours refuses it before Megatron's loader, which would run it, sees the checkpoint."""
    directory, _ = grid_checkpoint
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    metadata = dcp.FileSystemReader(copy).read_metadata()
    metadata.planner_data = Attack(tmp_path / "attacked")
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir, which no checkpoint needs"):
        DistReader(copy)
    assert not (tmp_path / "attacked").exists()
    pickle.loads((copy / ".metadata").read_bytes())
    assert (tmp_path / "attacked").exists(), "the attack would have worked"


def test_no_pickle_of_a_chunk_is_run(tmp_path):
    dcp.save({"a": torch.ones(3, 2)}, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    path = tmp_path / "ckpt" / "__0_0.distcp"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            attack = pickle.dumps(Attack(tmp_path / "attacked"))
            archive.writestr(name, attack if name.endswith("data.pkl") else data)
    metadata = dcp.FileSystemReader(tmp_path / "ckpt").read_metadata()
    for info in metadata.storage_data.values():
        info.length = path.stat().st_size
    (tmp_path / "ckpt" / ".metadata").write_bytes(pickle.dumps(metadata))
    with (
        DistReader(tmp_path / "ckpt") as reader,
        pytest.raises(CheckpointError, match="mkdir is not a plain tensor"),
    ):
        reader.read_rows("a", None, 0, torch.zeros(3, 2))
    assert not (tmp_path / "attacked").exists()


def test_a_tensor_that_is_not_contiguous_is_refused_not_misread(tmp_path):
    class Transposing(GridPlanner):
        def resolve_data(self, item):
            return self.tensors[item.index.fqn].t().contiguous().t()

    planner = Transposing({"a": torch.randn(3, 2)}, {"a": (1, 1)})
    dcp.save({}, storage_writer=dcp.FileSystemWriter(tmp_path / "ckpt"), planner=planner, no_dist=True)
    with (
        DistReader(tmp_path / "ckpt") as reader,
        pytest.raises(CheckpointError, match="cannot be read by rows"),
    ):
        reader.read_rows("a", None, 0, torch.zeros(3, 2))


def test_broken_checkpoints_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"\.metadata is missing"):
        DistReader(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        DistReader(tmp_path)
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt")
    weights = tmp_path / "ckpt" / "weights"
    (tmp_path / "ckpt" / "seal.json").unlink()  # as of another program, whose files nothing describes
    key, rows = "module.embedding.word_embeddings.weight", torch.zeros((300, 32), dtype=torch.bfloat16)
    for path in weights.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with DistReader(weights) as reader, pytest.raises(CheckpointError, match="copy the checkpoint again"):
        reader.read_rows(key, None, 0, rows)
    for path in weights.glob("*.distcp"):
        path.unlink()
    with DistReader(weights) as reader, pytest.raises(CheckpointError, match="is missing"):
        reader.read_rows(key, None, 0, rows)
