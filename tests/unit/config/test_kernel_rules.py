"""Switches for speed and memory: refused where Megatron would ignore them, or where what they need is not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from asft_nemo.config import machine as parts

Violations = Callable[..., tuple[str, ...]]
Machine = Callable[..., None]

SP = ("objective=asft", "precision=bf16", "parallel.tp_size=2", "parallel.sequence_parallel=true")
OVERLAP = "parallel.tp_comm_overlap=true"
OFFLOAD = "optim.cpu_offload=0.5"
LOCAL = "kernels.layers=local"
FUSION = "kernels.gradient_accumulation_fusion=true"
SELECTIVE = ("objective=asft", "recompute.granularity=selective")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Sets what this machine seems to have."""

    def have(*, gpus: int = 2, transformer_engine: bool = True, fusion: bool = True) -> None:
        monkeypatch.setattr(parts, "gpu_count", lambda: gpus)
        monkeypatch.setattr(parts.Part, "there", lambda self: transformer_engine)
        monkeypatch.setattr(parts, "has_fused_weight_gradient", lambda: fusion)

    return have


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("objective=asft", "precision=bf16", OVERLAP),
            "parallel.tp_comm_overlap=true overlaps the gathers and scatters of sequence parallelism, and this run has none",
        ),
        ((*SP[:3], OVERLAP), "set parallel.tp_size=2 or more with parallel.sequence_parallel=true"),
        ((*SP, "precision=fp32", OVERLAP), "precision=fp32 has neither: set precision=bf16"),
        ((*SP, "data.group_by_length=true", OVERLAP), "buffers of one size, and data.group_by_length=true"),
        (
            (*SP, "reference.micro_batch_size=4", OVERLAP),
            "reference.micro_batch_size=4 differs from trainer.micro_batch_size=2",
        ),
        (("objective=asft", "precision=bf16", OFFLOAD), "set optim.distributed=true"),
        (
            ("objective=asft", "precision=fp32", "optim.distributed=true", OFFLOAD),
            "optim.cpu_offload=0.5 works with bf16 parameters, and this run has precision=fp32",
        ),
        (("objective=asft", "optim.cpu_offload=1.5"), "set a value of at least 0 and at most 1"),
        ((*SELECTIVE, "recompute.modules=[]"), "does not name parts of a layer, each once"),
        ((*SELECTIVE, "recompute.modules=[mlp,mlp]"), "recompute.modules=[mlp, mlp] does not name parts"),
        # Transformer Engine's layers have no norm of their own, so Megatron would ignore this one
        ((*SELECTIVE, "recompute.modules=[layernorm]"), "choose from core_attn, mlp"),
        (
            (*SP, OVERLAP, LOCAL),
            "parallel.tp_comm_overlap=true is part of Transformer Engine's layers, and kernels.layers=local leaves them out",
        ),
        (
            ("objective=sft", "reference=none", "precision=fp8_delayed", LOCAL),
            "precision=fp8_delayed is part of Transformer Engine's layers",
        ),
        (
            ("objective=asft", "precision=bf16", "reference=resident", "reference.precision=fp8", LOCAL),
            "reference.precision=fp8 is part of Transformer Engine's layers",
        ),
        (("objective=asft", "kernels.layers=te"), "kernels.layers=te is unknown: set one of auto, local"),
        (
            ("objective=asft", "recompute.granularity=full", "recompute.modules=[mlp]"),
            "recompute.modules does nothing with recompute.granularity=full",
        ),
    ],
)
def test_one_sentence(
    violations: Violations, machine: Machine, overrides: tuple[str, ...], said: str
) -> None:
    machine()
    found = violations(*overrides)
    assert [sentence for sentence in found if said in sentence], found


@pytest.mark.parametrize(
    "overrides",
    [
        (*SP, OVERLAP),
        (*SP, OVERLAP, "reference.micro_batch_size=2"),
        (*SP, OVERLAP, "data.packing=true", "trainer.micro_batch_size=1"),
        (*SELECTIVE, "recompute.modules=[core_attn,mlp]"),
        ("objective=asft", FUSION),
        ("objective=asft", "precision=bf16", LOCAL),
        ("objective=asft", "precision=bf16", "optim.distributed=true", OFFLOAD),
        # context-parallel ranks reduce gradients among themselves, so this is not idle
        ("objective=asft", "parallel.cp_size=2", "optim.overlap_grad_reduce=true"),
    ],
)
def test_what_fits_is_accepted(violations: Violations, machine: Machine, overrides: tuple[str, ...]) -> None:
    machine()
    assert violations(*overrides) == ()


@pytest.mark.parametrize(
    "lacks", [{"gpus": 0}, {"transformer_engine": False}], ids=["no_gpu", "no_transformer_engine"]
)
def test_tensor_overlap_needs_transformer_engine_on_a_gpu(
    violations: Violations, machine: Machine, lacks: dict[str, int]
) -> None:
    machine(**lacks)
    [sentence] = violations(*SP, OVERLAP)
    assert "needs a GPU and Transformer Engine" in sentence
    assert "leave it out, or run where both are (docs/container.md)" in sentence


@pytest.mark.parametrize("lacks", [{"gpus": 0}, {"fusion": False}], ids=["no_gpu", "no_kernel"])
def test_fusion_needs_its_kernel(violations: Violations, machine: Machine, lacks: dict[str, int]) -> None:
    machine(**lacks)
    [sentence] = violations("objective=asft", FUSION)
    assert "needs a GPU and apex's fused_weight_gradient_mlp_cuda" in sentence
    assert violations("objective=asft", "kernels.gradient_accumulation_fusion=false") == ()
    assert violations("objective=asft") == ()
