"""Operations of a step, against NeMo's formula, against products that torch counts, and against sums made by hand."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from asft_nemo.config.model_shape import ModelShape
from asft_nemo.config.schema import RunConfig, from_dict, replace
from asft_nemo.planner.flops import (
    Computed,
    Flops,
    adapter_flops,
    causal_pairs,
    forward_flops,
    step_flops,
    training_flops,
)

QWEN_7B = ModelShape(28, 3584, 28, 4, 18944, 152064, 131072)
LLAMA_8B = ModelShape(32, 4096, 32, 8, 14336, 128256, 8192)
TINY = ModelShape(2, 64, 4, 2, 96, 128, 512)
ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@pytest.fixture
def nemo_formulas(monkeypatch: pytest.MonkeyPatch) -> Any:
    """NeMo's own module, without the rest of NeMo, whose import takes 10 s."""
    file = Path(sysconfig.get_paths()["purelib"]) / "nemo" / "utils" / "flops_formulas.py"
    vocabularies: Any = ModuleType("perf_metrics_utils")
    vocabularies.LLM_VOCAB_SIZE_MAP = {"llama3": LLAMA_8B.vocab_size}
    monkeypatch.setitem(sys.modules, "nemo.collections.common.parts.perf_metrics_utils", vocabularies)
    spec = importlib.util.spec_from_file_location("nemo_flops_formulas", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("length", [512, 8192])
def test_full_rows_with_the_head_everywhere_are_nemos_number(nemo_formulas: Any, length: int) -> None:
    batch, shape = 4, LLAMA_8B
    forward = forward_flops(shape, tokens=batch * length, attended=causal_pairs([length] * batch))
    theirs = nemo_formulas.llama3(
        nemo_formulas.FLOPSConfig(
            gbs=batch,
            enc_seq_len=length,
            hs=shape.hidden_size,
            layers=shape.num_layers,
            ffn_hs=shape.ffn_hidden_size,
            attention_heads=shape.num_attention_heads,
            query_groups=shape.num_query_groups,
        )
    )
    assert training_flops(forward, adapters=None) == pytest.approx(theirs, rel=1e-12)


def test_fewer_learned_tokens_take_away_head_products_alone() -> None:
    whole = forward_flops(QWEN_7B, tokens=1000, attended=0)
    part = forward_flops(QWEN_7B, tokens=1000, attended=0, head_tokens=250)
    assert part.layers == whole.layers
    assert whole.total - part.total == 2 * 750 * QWEN_7B.hidden_size * QWEN_7B.vocab_size


def test_a_packed_row_attends_within_its_examples() -> None:
    assert causal_pairs([8]) == 32
    assert causal_pairs([4, 4]) == 16
    assert causal_pairs([]) == 0


@pytest.mark.parametrize("trained", ["all", "adapters"])
def test_linear_layers_are_the_products_torch_counts(trained: str) -> None:
    """Products of one layer, the head and the adapters, forward and backward, as torch's counter sees them run."""
    tokens, rank = 32, 8
    x = torch.randn(tokens, TINY.hidden_size, requires_grad=True)
    layers = {
        "linear_qkv": (64, 64 + 2 * 32),
        "linear_proj": (64, 64),
        "linear_fc1": (64, 192),
        "linear_fc2": (96, 64),
        "head": (64, 128),
    }
    total = torch.zeros(())
    with FlopCounterMode(display=False) as counter:
        for name, (inputs, outputs) in layers.items():
            given = x if inputs == 64 else torch.cat([x, x[:, :32]], dim=1)
            total = total + (given @ torch.randn(inputs, outputs, requires_grad=trained == "all")).sum()
            if trained == "adapters" and name != "head":
                down, up = (torch.randn(inputs, rank), torch.randn(rank, outputs))
                total = total + (given @ down.requires_grad_() @ up.requires_grad_()).sum()
        total.backward()
    shape = ModelShape(1, 64, 4, 2, 96, 128, 512)
    forward = forward_flops(shape, tokens=tokens, attended=0)
    adapters = adapter_flops(shape, tokens=tokens, rank=rank, targets=ALL) if trained == "adapters" else None
    assert training_flops(forward, adapters=adapters) == counter.get_total_flops()


def test_attention_is_half_of_the_square_torch_counts() -> None:
    length, heads, channels = 48, TINY.num_attention_heads, TINY.head_channels
    q, k, v = (torch.randn(1, heads, length, channels) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        torch.matmul(torch.matmul(q, k.transpose(-1, -2)), v)
    one = forward_flops(ModelShape(1, 64, 4, 2, 96, 128, 512), tokens=0, attended=causal_pairs([length]))
    assert 2 * one.attention == counter.get_total_flops()


def test_lora_trains_for_less_than_three_forward_passes_and_more_than_two() -> None:
    forward = forward_flops(QWEN_7B, tokens=4096, attended=causal_pairs([4096]))
    adapters = adapter_flops(QWEN_7B, tokens=4096, rank=8, targets=ALL)
    cost = training_flops(forward, adapters=adapters)
    assert 2 * forward.total < cost < 2.2 * forward.total
    assert training_flops(Flops(0, 5, 0), adapters=0) == 15  # both factors of a score have a gradient


def test_heads_of_their_own_width_count() -> None:
    wide = ModelShape(1, 64, 4, 2, 96, 128, 512, head_dim=32)
    assert wide.head_channels == 32
    assert forward_flops(wide, tokens=0, attended=1).attention == 4 * 4 * 32
    more = (
        forward_flops(wide, tokens=1, attended=0).layers
        - forward_flops(TINY, tokens=1, attended=0).layers / 2
    )
    assert (
        more == 2 * 64 * (2 * 4 + 2 * 2) * 16
    )  # query and output rows, key and value rows, 16 channels more


STEP = Computed(positions=1000.0, attended=100_000.0, learned=300.0)


@pytest.fixture(scope="module")
def run_of() -> Callable[..., RunConfig]:
    """Settings of a run as flat keys over asft with a resident reference."""

    def made(**more: Any) -> RunConfig:
        run = from_dict(
            {
                "recipe": "tiny_cpu",
                "objective": {"name": "asft"},
                "reference": {"form": "resident"},
                "peft": {"name": "none"},
                "cluster": {"name": "local"},
                "model": {"path": "nowhere"},
            }
        )
        return replace(run, {key.replace("__", "."): value for key, value in more.items()})

    return made


def test_a_step_of_asft_costs_three_forward_passes_and_one(run_of: Callable[..., RunConfig]) -> None:
    cost = step_flops(run_of(), QWEN_7B, STEP)
    forward = forward_flops(QWEN_7B, tokens=1000, attended=100_000, head_tokens=300)
    assert (cost.policy, cost.frozen) == (3 * forward.total, forward.total)
    assert cost.policy_by_convention == 3 * forward_flops(QWEN_7B, tokens=1000, attended=100_000).total
    dense = step_flops(run_of(loss__implementation="dense"), QWEN_7B, STEP)
    assert dense.policy == dense.policy_by_convention  # its head sees every position
    lora = step_flops(run_of(peft__name="lora", reference__form="adapter_disabled"), QWEN_7B, STEP)
    assert lora.frozen == cost.frozen
    assert lora.policy < cost.policy


@pytest.mark.parametrize(
    ("more", "hit_rate", "bodies", "heads"),
    [
        ({"objective__name": "sft", "reference__form": "none"}, None, 0, 0),
        ({"objective__kl_weight": 0.0, "reference__form": "none"}, None, 0, 0),
        ({"reference__form": "cached"}, 1.0, 0, 1),
        ({"reference__form": "cached"}, None, 0, 1),
        ({"reference__form": "cached", "reference__fill": "first_epoch"}, 0.0, 1, 1),
        ({"objective__name": "iw_sft"}, None, 1, 1),
        ({"objective__name": "psft", "reference__form": "none"}, None, 1, 1),
    ],
)
def test_frozen_passes_by_what_is_read(
    more: dict[str, Any], hit_rate: float | None, bodies: int, heads: int, run_of: Callable[..., RunConfig]
) -> None:
    forward = forward_flops(QWEN_7B, tokens=1000, attended=100_000, head_tokens=300)
    cost = step_flops(run_of(**more), QWEN_7B, STEP, hit_rate=hit_rate)
    assert cost.frozen == bodies * (forward.layers + forward.attention) + heads * forward.head
