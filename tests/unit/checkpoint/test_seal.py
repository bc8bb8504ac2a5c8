"""A sealed checkpoint that was changed afterwards is refused by whoever opens it; numbers are held against torch's own checksums."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from asft_nemo.checkpoint import dist_read, seal
from asft_nemo.checkpoint.convert import export_hf, import_hf
from asft_nemo.checkpoint.dist_read import DistReader
from asft_nemo.checkpoint.seal import SEAL, check_seal, write_seal
from asft_nemo.config.paths import project_dir
from asft_nemo.errors import CheckpointError
from asft_nemo.reference.cached import read_head


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed") / "nemo"
    import_hf(project_dir() / "assets" / "tiny-base", folder)
    return folder


@pytest.fixture
def copied(sealed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sealed, tmp_path / "nemo"))


def flip(path: Path, place: int) -> None:
    """Another bit, with the size and the times that the file had."""
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def refusal(reader: DistReader, part: int, parts: int) -> str:
    """What is said of a rank's share; empty where it is whole."""
    try:
        reader.check_numbers(part=part, parts=parts)
    except CheckpointError as error:
        return str(error)
    return ""


def test_every_file_is_sealed_and_a_copy_is_as_good(sealed: Path, copied: Path) -> None:
    named = set(json.loads((sealed / SEAL).read_text())["files"])
    there = {str(path.relative_to(sealed)) for path in sealed.rglob("*") if path.is_file()}
    assert named == there - {str(SEAL)}
    check_seal(copied)


@pytest.mark.parametrize(
    "name", ["weights/.metadata", "weights/common.pt", "context/hf/config.json", "context/asft.json"]
)
def test_a_flipped_bit_is_refused(name: str, copied: Path) -> None:
    size = (copied / name).stat().st_size
    flip(copied / name, random.Random(name).randrange(size))
    with pytest.raises(CheckpointError, match=f"{name} is not as it was written: copy the checkpoint again"):
        DistReader(copied / "weights")


@pytest.mark.parametrize(
    ("how", "said"), [("cut", "has 7 bytes where"), ("gone", "is missing, and was there")]
)
def test_a_file_that_is_cut_or_gone_is_refused(how: str, said: str, copied: Path) -> None:
    file = copied / "weights" / "__0_3.distcp"
    if how == "cut":
        os.truncate(file, 7)
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=f"__0_3.distcp {said}"):
        DistReader(copied / "weights")


def test_another_checkpoints_file_of_the_same_size_is_refused(copied: Path) -> None:
    """Its chunks have checksums of their own, which are right."""
    file, other = copied / "weights" / "__0_3.distcp", copied / "weights" / "__0_4.distcp"
    assert file.stat().st_size == other.stat().st_size
    shutil.copyfile(other, file)
    with pytest.raises(CheckpointError, match=r"__0_3\.distcp is not as it was written"):
        DistReader(copied / "weights")


def test_a_damaged_seal_is_refused(copied: Path) -> None:
    text = (copied / SEAL).read_text()
    (copied / SEAL).write_text(text.replace('"bytes": ', '"bytes": 1', 1))
    with pytest.raises(CheckpointError, match=r"seal\.json is damaged"):
        check_seal(copied)


def test_a_newer_seal_is_refused(copied: Path) -> None:
    (copied / SEAL).write_text('{"format": 3}')
    with pytest.raises(CheckpointError, match="format 3, newer than 2: upgrade"):
        check_seal(copied)


def test_somebody_elses_files_and_checkpoints_are_left_alone(copied: Path) -> None:
    (copied / "notes.txt").write_text("mine")
    check_seal(copied)
    (copied / SEAL).unlink()
    flip(copied / "weights" / "common.pt", 3)
    DistReader(copied / "weights").close()


def test_another_number_is_refused_before_it_is_exported_or_loaded(copied: Path, tmp_path: Path) -> None:
    """torch would load it, and says nothing."""
    file = copied / "weights" / "__0_3.distcp"
    flip(file, file.stat().st_size // 2 + 9_000)  # between two of the seal's blocks
    with pytest.raises(CheckpointError, match=r"__0_3.distcp: the chunk of .* cannot be read .*CRC"):
        export_hf(copied, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    with DistReader(copied / "weights") as reader:
        found = [refusal(reader, part, 3) for part in range(3)]
    assert len([said for said in found if said]) == 1
    assert "__0_3.distcp" in "".join(found)


def test_a_seal_is_written_anew(copied: Path) -> None:
    flip(copied / "context" / "hf" / "README.md", 5)
    write_seal(copied)
    check_seal(copied)


def between_blocks(size: int) -> int:
    """A place in a large file that no block of a sampled sum holds."""
    return 5000 + (size - 4096) // 15


def test_a_large_file_that_holds_no_numbers_is_sealed_whole(copied: Path) -> None:
    """A tokenizer of 150,000 words has 7 MB."""
    file = copied / "context" / "hf" / "tokenizer.json"
    file.write_bytes(random.Random(0).randbytes(3 << 20))
    write_seal(copied)
    check_seal(copied)
    flip(file, between_blocks(3 << 20))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not as it was written"):
        check_seal(copied)


def test_large_numbers_are_sealed_by_blocks_for_their_chunks_have_sums(copied: Path) -> None:
    file = copied / "weights" / "__9_9.distcp"
    file.write_bytes(random.Random(0).randbytes(3 << 20))
    write_seal(copied)
    flip(file, between_blocks(3 << 20))
    check_seal(copied)
    flip(file, 100)
    with pytest.raises(CheckpointError, match=r"__9_9\.distcp is not as it was written"):
        check_seal(copied)


def test_a_seal_of_the_first_format_is_read(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has blocks of every large file."""
    file = copied / "context" / "hf" / "tokenizer.json"
    file.write_bytes(random.Random(0).randbytes(3 << 20))
    sum_of = seal._crc32
    monkeypatch.setattr(seal, "FORMAT", 1)
    monkeypatch.setattr(seal, "_crc32", lambda path, size: sum_of(path, size, blocks=True))
    write_seal(copied)
    monkeypatch.undo()
    assert json.loads((copied / SEAL).read_text())["format"] == 1
    check_seal(copied)
    flip(file, 100)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not as it was written"):
        check_seal(copied)


def test_the_head_that_a_cached_reference_reads_is_held_against_its_sum(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a head of several MB, of which the seal has blocks."""
    monkeypatch.setattr(dist_read, "check_seal", lambda checkpoint: None)
    with DistReader(copied / "weights") as reader:
        name = "module.embedding.word_embeddings.weight"
        index, chunk = next((i, c) for i, c in reader._storage.items() if i.fqn == name)
    flip(copied / "weights" / chunk.relative_path, chunk.offset + chunk.length // 2)
    assert index.fqn == name
    with pytest.raises(CheckpointError, match="copy the checkpoint again"):
        read_head(copied / "weights", tied=True, first_row=0, rows=8, dtype=torch.float32)
