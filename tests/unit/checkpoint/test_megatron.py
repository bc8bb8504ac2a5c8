"""Megatron's own model at TP2 x PP2 reads an import, agrees with transformers, and what it saves exports unchanged."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hf_cases import VOCAB, assert_same_bits, read_hf, tensors_of, write_hf

from asft_nemo.checkpoint import export_hf, import_hf, verify

pytestmark = [pytest.mark.multiproc, pytest.mark.nemo, pytest.mark.slow]
RANKS = Path(__file__).with_name("megatron_ranks.py")
WORLD_SIZE, TIME_OUT_SECONDS = 4, 180


def run_ranks(folders: list[Path]) -> None:
    """Starts the ranks and waits; the first that fails ends them all."""
    environment = os.environ | {"ASFT_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    logs = [folders[0].parent / f"log.{rank}" for rank in range(WORLD_SIZE)]
    processes = []
    try:
        for rank, path in enumerate(logs):
            with path.open("w") as log:
                command = [sys.executable, str(RANKS), str(rank), *map(str, folders)]
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        deadline = time.monotonic() + TIME_OUT_SECONDS
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() not in (None, 0) for process in processes):
                break
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * WORLD_SIZE, "\n".join(
        f"rank {rank} ended with {code}: {logs[rank].read_text()[-3000:]}"
        for rank, code in enumerate(codes)
        if code != 0
    )


def make_case(folder: Path, *, tied: bool) -> dict[str, torch.Tensor]:
    """A bf16 checkpoint of four layers (two per stage), imported; returns its tensors."""
    tensors = tensors_of(tied=tied, dtype=torch.bfloat16)
    last = {name: tensor for name, tensor in tensors.items() if ".layers.2." in name}
    tensors |= {name.replace(".2.", ".3."): torch.empty_like(tensor) for name, tensor in last.items()}
    for tensor in tensors.values():
        tensor.copy_(torch.randn(tensor.shape) * 0.3 if tensor.ndim == 2 else torch.rand(tensor.shape))
    write_hf(folder / "hf", tied=tied, files=3, tensors=tensors)
    config = folder / "hf" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    import_hf(folder / "hf", folder / "ckpt")
    torch.save(torch.randint(0, VOCAB, (2, 24)), folder / "tokens.pt")
    return tensors


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Both cases, loaded into fp32 models at TP2 x PP2 and saved by them; the ranks are started once."""
    root = tmp_path_factory.mktemp("ranks")
    made = {kind: (root / kind, make_case(root / kind, tied=kind == "tied")) for kind in ("untied", "tied")}
    run_ranks([folder for folder, _ in made.values()])
    for folder, _ in made.values():
        shutil.copytree(folder / "ckpt" / "context", folder / "trained" / "context")
    return made


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_logits_equal_those_of_transformers(cases, kind):
    transformers = pytest.importorskip("transformers")
    folder, _ = cases[kind]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.load(folder / "tokens.pt")).logits
    assert (torch.load(folder / "logits.pt") - theirs).abs().max() <= 2e-6 * theirs.abs().max()


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_a_bf16_import_fills_an_fp32_model_and_its_padding_with_zeros(cases, kind):
    folder, _ = cases[kind]
    figures = [json.loads((folder / f"figures.{rank}.json").read_text()) for rank in range(WORLD_SIZE)]
    assert all(rank["dtypes"] == ["torch.float32"] for rank in figures)
    # The second tensor-parallel rank of each stage holds the end of the vocabulary.
    assert [rank["padded"] for rank in figures] == [0, 1, 0, 1]
    assert all(rank["padding"] == 0.0 for rank in figures)


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_what_megatron_saves_exports_bit_for_bit(cases, kind, tmp_path):
    folder, tensors = cases[kind]
    assert verify(folder / "trained", folder / "hf").identical
    export_hf(folder / "trained", tmp_path / "back", max_shard_bytes=60_000)
    assert_same_bits(read_hf(tmp_path / "back"), tensors)
    assert (tmp_path / "back/config.json").read_bytes() == (folder / "hf/config.json").read_bytes()
