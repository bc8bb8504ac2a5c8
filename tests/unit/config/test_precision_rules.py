"""Precisions that do not go together, precisions that people know from elsewhere, and what FP8 asks of the sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from asft_nemo.config import machine as parts
from asft_nemo.config import rules
from asft_nemo.config.fp8 import FP8
from asft_nemo.config.load import compose
from asft_nemo.config.schema import RunConfig
from asft_nemo.config.tables import CHOICES
from asft_nemo.data.ordering import padding_multiple

Violations = Callable[..., tuple[str, ...]]
RESIDENT = ("objective=asft", "reference=resident")
OVERLAP = ("parallel.tp_size=2", "parallel.sequence_parallel=true", "parallel.tp_comm_overlap=true")
LORA = ("objective=asft", "peft=lora", "reference=adapter_disabled")
POLICIES = [name for name, row in FP8.items() if row.key == "precision"]


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU and Transformer Engine, as far as the rules look."""
    monkeypatch.setattr(parts, "gpu_count", lambda: 16)
    monkeypatch.setattr(parts.Part, "there", lambda self: True)
    monkeypatch.setattr(parts, "version_of", lambda name: "2.8.0+5b3092a")


def test_the_table_has_every_fp8_precision() -> None:
    assert [name for name in CHOICES["precision"] if name.startswith("fp8")] == POLICIES


@pytest.mark.parametrize("name", POLICIES)
def test_a_machine_without_kernels_refuses(violations: Violations, name: str) -> None:
    [sentence] = violations("objective=sft", "reference=none", f"precision={name}")
    assert sentence == (
        f"precision={name} needs a GPU and Transformer Engine, and this run has no GPU and no Transformer Engine: set precision=bf16, or "
        "run it where both are (docs/container.md)"
    )


@pytest.mark.parametrize(
    ("name", "version", "refused"),
    [
        ("fp8_current", "2.1.0", True),
        ("fp8_current", "2.2.0.dev0+abc", False),
        ("fp8_blockwise", "2.2.0", True),
        ("fp8_blockwise", "2.10.0", False),
        ("fp8_delayed", "1.13.0", True),
        ("fp8_delayed", "2.1", False),
    ],
)
def test_an_older_transformer_engine(
    violations: Violations,
    with_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    version: str,
    refused: bool,
) -> None:
    monkeypatch.setattr(parts, "version_of", lambda name: version)
    found = violations("objective=sft", "reference=none", f"precision={name}")
    assert len(found) == refused
    oldest = ".".join(map(str, FP8[name].transformer_engine))
    assert all(f"has no Transformer Engine of version {oldest} or newer" in sentence for sentence in found)


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize(
    "overrides",
    [
        *[(*RESIDENT, f"precision={name}") for name in ("fp8_current", "fp8_blockwise")],
        *[(*LORA, f"precision={name}") for name in ("fp8_current", "fp8_blockwise")],
        (*RESIDENT, "precision=fp8_current", "reference.precision=bf16", "reference.max_initial_kl=0.2"),
        (*RESIDENT, "precision=fp8_delayed", "reference.precision=fp8"),
        ("objective=sft", "reference=none", "precision=fp8_delayed"),
        ("objective=asft", "reference=cached", "precision=fp8_delayed", "reference.precision=fp8"),
        ("objective=psft", "reference=none", "precision=fp8_current"),
        (*RESIDENT, "precision=fp8_current", "recompute.granularity=full"),
        (*RESIDENT, "precision=fp8_current", "data.packing=true", "trainer.micro_batch_size=1"),
        (*RESIDENT, "precision=fp8_current", "parallel.cp_size=2"),
        ("objective=sft", "reference=none", "precision=fp8_delayed", *OVERLAP),
        (*RESIDENT, "precision=bf16", *OVERLAP),
    ],
    ids=" ".join,
)
def test_what_goes_together(
    violations: Violations, configure: Callable[..., RunConfig], overrides: tuple[str, ...]
) -> None:
    assert violations(*overrides) == ()
    rules.check(configure(*overrides))  # as every rank does, which knows no levels


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            (*LORA, "precision=fp8_delayed"),
            "write into the scales that the policy trains with: set precision=fp8_current, or",
        ),
        (
            (*RESIDENT, "precision=fp8_delayed"),
            "and the reference has none: set reference.precision=bf16 (or fp8)",
        ),
        (
            ("objective=asft", "reference=cached", "precision=fp8_delayed"),
            "and the reference has none: set reference.precision=bf16 (or fp8)",
        ),
        (
            ("objective=psft", "reference=none", "precision=fp8_delayed"),
            "the snapshot that objective=psft reads has none",
        ),
        (
            (*RESIDENT, "precision=fp8_blockwise", "reference.precision=bf16"),
            "starts at the KL that FP8's rounding makes, and reference.max_initial_kl=0.01 is a bound for equal kernels: set a larger one",
        ),
        ((*RESIDENT, "precision=fp32", "reference.precision=fp8"), "beside precision=fp32 would measure"),
        (("objective=sft", "reference=none", "precision=fp16"), "precision=fp16 is not supported"),
        ((*RESIDENT, "reference.precision=fp16"), "reference.precision=fp16 is not supported"),
        (("objective=sft", "reference=none", "precision=mxfp8"), "GPUs of the Blackwell generation alone"),
        (
            ("objective=sft", "reference=none", "precision=fp8"),
            "set precision=fp8_current, fp8_blockwise or fp8_delayed",
        ),
        (
            ("objective=sft", "reference=none", "precision=int8"),
            "precision=int8 is unknown: set one of fp32, bf16",
        ),
        (("objective=sft", "reference=none", "precision=fp8_blockwise", *OVERLAP), "has one a block"),
        (
            ("objective=sft", "reference=none", "precision=fp8_current", *OVERLAP),
            "keeps layers in bf16 beside",
        ),
        (
            (*RESIDENT, "precision=bf16", "reference.precision=fp8", *OVERLAP),
            "the reference runs in reference.precision=fp8",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_does_not(violations: Violations, overrides: tuple[str, ...], sentence: str) -> None:
    [found] = violations(*overrides)
    assert sentence in found


@pytest.mark.usefixtures("with_kernels")
def test_tokens_that_have_gradients_come_in_sixteens(violations: Violations) -> None:
    asked = ("objective=sft", "reference=none", "trainer.micro_batch_size=1", "data.sequence_length=72")
    assert violations(*asked) == ()
    [sentence] = violations(*asked, "precision=fp8_current")
    assert "precision=fp8_current needs a multiple of 16 tokens in a micro batch, got 1 x 72" in sentence
    assert sentence.endswith("set data.sequence_length=80")
    # a frozen reference has no gradients of weights
    assert violations(*RESIDENT, *asked[2:], "precision=bf16", "reference.precision=fp8") == ()


@pytest.mark.usefixtures("with_kernels")
def test_rows_grouped_by_length_are_padded_to_what_fp8_takes(configure: Callable[..., RunConfig]) -> None:
    asked = ("objective=sft", "reference=none", "data.group_by_length=true")
    assert padding_multiple(configure(*asked, "precision=bf16")) == 8
    assert padding_multiple(configure(*asked, "precision=fp8_current")) == 16


@pytest.mark.usefixtures("with_kernels")
def test_columns_and_the_nearest_layout_that_fits(violations: Violations, model_dir: Path) -> None:
    file = model_dir / "config.json"
    sizes = {"intermediate_size": 96, "num_key_value_heads": 4}
    file.write_text(json.dumps({**json.loads(file.read_text()), **sizes}))
    [sentence] = violations(
        "objective=sft", "reference=none", "precision=fp8_blockwise", "parallel.tp_size=4"
    )
    assert (
        "multiples of 16 columns on each rank, got 24 (feed-forward columns): set parallel.tp_size=2"
        in sentence
    )


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("recipe", ["qwen25_1p5b", "qwen25_7b", "qwen25_32b", "qwen25_72b"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_recipes_take_every_fp8(
    recipe: str, name: str, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    published = {
        "qwen25_1p5b": (28, 1536, 12, 2, 8960),
        "qwen25_7b": (28, 3584, 28, 4, 18944),
        "qwen25_32b": (64, 5120, 40, 8, 27648),
        "qwen25_72b": (80, 8192, 64, 8, 29568),
    }
    layers, hidden, heads, groups, columns = published[recipe]
    shape = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": columns,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
    }
    (model_dir / "config.json").write_text(json.dumps(shape))
    asked = ["objective=sft", "reference=none", f"precision={name}", "trainer.max_steps=1"]
    places = [f"model.path={model_dir}", f"data.train=[{data_file}]", f"run.dir={tmp_path / 'run'}"]
    run = compose([f"recipe={recipe}", *asked, *places], check_inputs=False)
    assert run.precision == name
