"""The name of base weights: which changes give another, which do not, and what it costs."""

import math

import pytest
import torch

from asft_nemo.checkpoint.dist_write import OutTensor, write_dist_checkpoint
from asft_nemo.errors import CheckpointError
from asft_nemo.reference import fingerprint
from asft_nemo.reference.fingerprint import weights_fingerprint

LAYERS, HIDDEN, VOCAB = 3, 16, 40


def _weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "module.embedding.word_embeddings.weight": torch.randn(VOCAB, HIDDEN),
        "module.decoder.layers.self_attention.linear_qkv.weight": torch.randn(LAYERS, 3 * HIDDEN, HIDDEN),
        "module.decoder.layers.self_attention.linear_qkv.bias": torch.randn(LAYERS, 3 * HIDDEN),
        "module.decoder.layers.mlp.linear_fc2.weight": torch.randn(LAYERS, HIDDEN, 4 * HIDDEN),
        "module.decoder.final_layernorm.weight": torch.ones(HIDDEN),
    }


def _save(directory, weights, *, block_bytes=1 << 20):
    stacked = {key: ".layers." in key for key in weights}
    tensors = [
        OutTensor(
            key=key,
            dtype=value.dtype,
            layers=len(value) if stacked[key] else None,
            shape=tuple(value.shape[1:] if stacked[key] else value.shape),
        )
        for key, value in weights.items()
    ]

    def produce(key, layer, start, stop):
        return (weights[key][layer] if stacked[key] else weights[key])[start:stop].clone()

    write_dist_checkpoint(directory, tensors, objects=[], produce=produce, block_bytes=block_bytes, threads=1)
    return directory


@pytest.fixture
def name(tmp_path):
    made = iter(range(10**6))
    return lambda weights, **how: weights_fingerprint(_save(tmp_path / str(next(made)), weights, **how))


def test_the_layout_of_the_files_does_not_count(name):
    assert name(_weights()) == name(_weights(), block_bytes=100)


@pytest.mark.parametrize("key", sorted(_weights()))
def test_one_changed_bit_of_a_small_tensor_counts(name, key):
    """All of these are small: each value of each layer is looked at."""
    before, weights = name(_weights()), _weights()
    places = torch.randperm(weights[key].numel(), generator=torch.Generator().manual_seed(1))[:2].tolist()
    for place in (0, weights[key].numel() - 1, *places):
        weights = _weights()
        weights[key].view(-1).view(torch.int32)[place] ^= 1
        assert name(weights) != before


def test_names_shapes_and_dtypes_count(name):
    before = name(_weights())
    key = "module.embedding.word_embeddings.weight"
    renamed = {("module.output_layer.weight" if k == key else k): value for k, value in _weights().items()}
    reshaped = _weights() | {key: _weights()[key].reshape(2 * VOCAB, HIDDEN // 2)}
    same_bytes = _weights() | {key: _weights()[key].view(torch.int32)}
    assert len({before, name(renamed), name(reshaped), name(same_bytes)}) == 4


def test_optimizer_state_does_not_count(name):
    assert name(_weights() | {"optimizer.state.exp_avg.module.weight": torch.randn(5)}) == name(_weights())


def test_large_matrices_are_sampled_by_rows_in_every_layer(name, monkeypatch):
    """What it sees and what it misses where a matrix is larger than what counts whole."""
    monkeypatch.setattr(fingerprint, "_WHOLE_BYTES", 0)
    before = name(_weights())
    key = "module.decoder.layers.self_attention.linear_qkv.weight"
    rows = 3 * HIDDEN
    sampled = {round(place * (rows - 1) / 7) for place in range(8)}
    assert sampled == {0, 7, 13, 20, 27, 34, 40, 47}
    for row in (0, 1, 3, 7, 20, 27, 40, rows - 2, rows - 1):
        weights = _weights()
        weights[key][row % LAYERS, row, row % HIDDEN] += 1
        assert (name(weights) != before) == (row in sampled)
    for layer in range(LAYERS):  # as a low-rank update does
        weights = _weights()
        weights[key][layer] += 1e-3 * torch.outer(torch.randn(rows), torch.randn(HIDDEN))
        assert name(weights) != before
    for vector in (
        "module.decoder.layers.self_attention.linear_qkv.bias",
        "module.decoder.final_layernorm.weight",
    ):
        weights = _weights()
        weights[vector].view(-1)[11] += 1
        assert name(weights) != before


def test_the_cost_at_full_size_is_as_documented():
    """Bytes of bf16 values that are read, counted from the shapes of Qwen2.5 7B and 72B."""

    def cost(layers, hidden, ffn, qkv, vocab):
        per_layer = [
            (hidden,),
            (hidden,),
            (qkv,),
            (qkv, hidden),
            (hidden, hidden),
            (2 * ffn, hidden),
            (hidden, ffn),
        ]
        shapes = layers * per_layer + [(hidden,), (vocab, hidden), (vocab, hidden)]
        return sum(
            rows * math.prod(shape[1:]) * 2 for shape in shapes for _, rows in fingerprint._sampled(shape, 2)
        )

    assert cost(28, 3584, 18944, 4608, 152064) / 1e6 == pytest.approx(14, abs=1)
    assert cost(80, 8192, 29568, 10240, 152064) / 1e6 == pytest.approx(73, abs=1)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no distributed checkpoint .*written to its end"):
        weights_fingerprint(tmp_path)
