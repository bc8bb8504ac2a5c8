"""A reference in FP8: refused without what computes it, beside what contradicts it, and at sizes its kernels refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from asft_nemo.config import fp8
from asft_nemo.config import machine as parts
from asft_nemo.config.schema import RunConfig, replace
from asft_nemo.errors import ConfigError
from asft_nemo.launch_local import launch_cache

FP8 = ("objective=asft", "precision=bf16", "reference.precision=fp8")
FIRST_EPOCH = ("reference=cached", "reference.fill=first_epoch")

Configure = Callable[..., RunConfig]
Violations = Callable[..., tuple[str, ...]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what this machine seems to have."""

    def have(*, gpu: bool, transformer_engine: bool) -> None:
        monkeypatch.setattr(parts, "gpu_count", lambda: int(gpu and not parts.forced_to_cpu()))
        monkeypatch.setattr(parts.Part, "there", lambda self: transformer_engine)
        monkeypatch.delenv("ASFT_DEVICE", raising=False)

    return have


@pytest.mark.parametrize(
    ("gpu", "transformer_engine", "missing"),
    [
        (False, False, "no GPU and no Transformer Engine:"),
        (True, False, "no Transformer Engine:"),
        (False, True, "no GPU:"),
    ],
)
@pytest.mark.parametrize("form", [("reference=resident",), ("reference=offloaded",), FIRST_EPOCH])
def test_refused_where_it_would_be_computed_without_kernels(
    violations: Violations, machine: Callable[..., None], gpu, transformer_engine, missing, form
) -> None:
    machine(gpu=gpu, transformer_engine=transformer_engine)
    [sentence] = violations(*FP8, *form)
    assert f"needs a GPU and Transformer Engine, and this run has {missing}" in sentence
    assert "set reference.precision=policy, or run it where both are (docs/container.md)" in sentence


def test_accepted_with_a_gpu_and_transformer_engine(
    violations: Violations, machine: Callable[..., None], monkeypatch
) -> None:
    machine(gpu=True, transformer_engine=True)
    for form in (("reference=resident",), ("reference=offloaded",), FIRST_EPOCH):
        assert violations(*FP8, *form) == ()
    monkeypatch.setenv("ASFT_DEVICE", "cpu")
    assert "this run has no GPU:" in violations(*FP8)[0]


def test_a_written_cache_is_read_anywhere_but_not_written(
    configure: Configure, machine: Callable[..., None]
) -> None:
    machine(gpu=False, transformer_engine=True)
    run = configure(*FP8, "reference=cached")
    with pytest.raises(ConfigError, match="this run has no GPU: set reference"):
        launch_cache(run, repair=False)
    assert not Path(run.run.dir).exists()
    fp8.require_fp8(replace(run, {"reference.precision": "policy"}))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("data.sequence_length=63",), "8 tokens in a micro batch, got 2 x 63: set data.sequence_length=64"),
        (("data.sequence_length=4", "trainer.micro_batch_size=2"), None),
        (
            (
                "data.sequence_length=24",
                "trainer.micro_batch_size=1",
                "parallel.tp_size=2",
                "parallel.sequence_parallel=true",
            ),
            "on each of 2 tensor-parallel ranks, got 1 x 12: set data.sequence_length=32",
        ),
        (
            ("data.sequence_length=24", "trainer.micro_batch_size=1", "parallel.cp_size=2"),
            "on each of 2 ranks, got 1 x 12: set data.sequence_length=32",
        ),
    ],
)
def test_tokens_of_a_micro_batch(
    violations: Violations, machine: Callable[..., None], overrides, sentence
) -> None:
    machine(gpu=True, transformer_engine=True)
    found = violations(*FP8, *overrides)
    assert len(found) == (sentence is not None)
    assert all(sentence in one for one in found)
    assert violations("objective=asft", "precision=bf16", *overrides) == ()


@pytest.mark.parametrize(
    ("sizes", "overrides", "sentence"),
    [
        ({"num_hidden_layers": 2}, (), "the first and the last layer in bf16, and the model has 2"),
        ({"num_hidden_layers": 3}, (), None),
        (
            {"hidden_size": 264},
            (),
            "multiples of 16 columns on each rank, got 264 (hidden size), 264 (attention columns): set reference",
        ),
        ({"intermediate_size": 528}, (), None),
        (
            {"intermediate_size": 528},
            ("parallel.tp_size=2",),
            "16 columns on each rank, got 264 (feed-forward columns): set parallel.tp_size=1, or reference.precision=policy",
        ),
    ],
)
def test_sizes_of_the_model(
    violations: Violations, machine: Callable[..., None], model_dir: Path, sizes, overrides, sentence
) -> None:
    machine(gpu=True, transformer_engine=True)
    file = model_dir / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **sizes}))
    found = violations(*FP8, *overrides)
    assert len(found) == (sentence is not None)
    assert all(sentence in one for one in found)
