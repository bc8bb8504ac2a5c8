"""Megatron's own model at TP2 x PP2 reads an import, agrees with transformers, and what it saves exports unchanged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_cases import CONVERTED_ONLY, VARIANTS, VOCAB, assert_same_bits, config_of, read_hf, write_variant
from ranks import run_alone

from asft_nemo.checkpoint import export_hf, import_hf, verify

pytestmark = [pytest.mark.multiproc, pytest.mark.nemo, pytest.mark.slow]
WORLD_SIZE = 4


TRAINED = [variant for variant in VARIANTS if variant not in CONVERTED_ONLY]


def make_case(folder: Path, variant: str) -> dict[str, torch.Tensor]:
    """A bf16 checkpoint of four layers (two per stage), imported; returns its tensors."""
    tensors = write_variant(folder / "hf", config_of(variant, layers=4), files=3)
    import_hf(folder / "hf", folder / "ckpt")
    generator = torch.Generator().manual_seed(1)
    torch.save(torch.randint(0, VOCAB, (2, 32), generator=generator), folder / "tokens.pt")
    return tensors


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """All cases, loaded into fp32 models at TP2 x PP2 and saved by them; the ranks are started once."""
    root = tmp_path_factory.mktemp("ranks")
    made = {variant: (root / variant, make_case(root / variant, variant)) for variant in TRAINED}
    folders = [str(folder) for folder, _ in made.values()]
    run_alone("megatron_ranks:run_cases", world_size=WORLD_SIZE, folders=folders)
    for folder, _ in made.values():
        shutil.copytree(folder / "ckpt" / "context", folder / "trained" / "context")
    return made


def logits_of_transformers(
    folder: Path, *, dtype: torch.dtype = torch.float64, **changes: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, S, V] and the frequencies of the rotary embedding."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "hf", dtype=dtype, attn_implementation="eager", **changes
    )
    with torch.no_grad():
        logits = model(torch.load(folder / "tokens.pt")).logits
    return logits.double(), model.model.rotary_emb.inv_freq


@pytest.mark.parametrize("variant", TRAINED)
def test_logits_equal_those_of_transformers(cases, variant):
    """Against fp64, where transformers' own fp32 logits of these sharp random models are 8e-7 to 5e-6 of the largest off."""
    folder, _ = cases[variant]
    exact, _ = logits_of_transformers(folder)
    naive, _ = logits_of_transformers(folder, dtype=torch.float32)
    ours = torch.load(folder / "logits.pt")
    error, theirs = (float((logits - exact).abs().max() / exact.abs().max()) for logits in (ours, naive))
    print(
        f"{variant} at TP2 x PP2: logits {error:.1e} of the largest one off, transformers' in fp32 {theirs:.1e}"
    )
    assert error <= theirs + 2e-6
    assert error <= 1e-5


@pytest.mark.parametrize("variant", ["llama-3", "llama-3.1", "llama-3.2"])
def test_frequencies_equal_those_of_transformers(cases, variant):
    """Bit for bit, the scaled ones of Llama 3.1 and 3.2 too: Megatron's constants are theirs."""
    folder, _ = cases[variant]
    figures = json.loads((folder / "figures.0.json").read_text())
    assert figures["frequencies"] == logits_of_transformers(folder)[1].tolist()


@pytest.mark.parametrize("variant", ["llama-3.1", "llama-3.2", "llama-linear"])
def test_a_scaling_that_was_forgotten_would_show(cases, variant):
    folder, _ = cases[variant]
    unscaled, _ = logits_of_transformers(folder, rope_scaling=None)
    assert (torch.load(folder / "logits.pt") - unscaled).abs().max() > 1e-3 * unscaled.abs().max()


@pytest.mark.parametrize("variant", TRAINED)
def test_a_bf16_import_fills_an_fp32_model_and_its_padding_with_zeros(cases, variant):
    folder, _ = cases[variant]
    figures = [json.loads((folder / f"figures.{rank}.json").read_text()) for rank in range(WORLD_SIZE)]
    assert all(rank["dtypes"] == ["torch.float32"] for rank in figures)
    # The second tensor-parallel rank of each stage holds the end of the vocabulary.
    assert [rank["padded"] for rank in figures] == [0, 1, 0, 1]
    assert all(rank["padding"] == 0.0 for rank in figures)


@pytest.mark.parametrize("variant", TRAINED)
def test_what_megatron_saves_exports_bit_for_bit(cases, variant, tmp_path):
    folder, tensors = cases[variant]
    assert verify(folder / "trained", folder / "hf").identical
    export_hf(folder / "trained", tmp_path / "back", max_shard_bytes=60_000)
    assert_same_bits(read_hf(tmp_path / "back"), tensors)
    assert (tmp_path / "back/config.json").read_bytes() == (folder / "hf/config.json").read_bytes()
