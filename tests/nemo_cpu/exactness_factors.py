"""What the exactness matrix varies, and which combinations exist: the project's own rules say so."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradients import BATCH, LENGTH, OBJECTIVES
from jobs import VOCAB, run_config

from asft_nemo.config import rules
from asft_nemo.config.facts import Level
from asft_nemo.config.model_shape import ModelShape
from asft_nemo.errors import ConfigError

Case = dict[str, str]  # factor -> level
Pair = tuple[tuple[str, str], tuple[str, str]]

RANKS = 4  # the most that a case may start: two cores run them
SIZES = ("tp", "pp", "cp", "dp")  # their product is the number of ranks
#: of the random model; four key/value heads for TP4, eight layers for PP4 with two virtual stages each
SHAPE = ModelShape(
    num_layers=8,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=128,
    vocab_size=VOCAB,
    max_positions=128,
)
LORA = {"peft.name": "lora", "peft.rank": 8, "peft.alpha": 16.0, "peft.dropout": 0.0}

#: factor -> level -> settings that are given; the first level is what a case has where a factor is not looked at
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "objective": {
        "sft": OBJECTIVES["sft"],
        "dft": OBJECTIVES["dft"],
        "sft_kl": {"objective.name": "sft_kl"},
        "asft": {"objective.name": "asft"},
        "asft_sft": OBJECTIVES["asft_sft"],
        "iw_sft": OBJECTIVES["iw_sft"],
        "eaft": OBJECTIVES["eaft"],
        "psft": OBJECTIVES["psft"],
    },
    "kl": {
        "as it comes": {},
        "forward": {"objective.kl_weight": 0.5, "objective.kl_direction": "forward"},
        "reverse": {"objective.kl_weight": 0.5, "objective.kl_direction": "reverse"},
    },
    "adapters": {"none": {"peft.name": "none"}, "lora": LORA},
    "reference": {
        "none": {"reference.form": "none"},
        "resident": {"reference.form": "resident"},
        "offloaded": {"reference.form": "offloaded"},
        "cached": {"reference.form": "cached", "reference.fill": "job"},
        "cached by epoch 1": {"reference.form": "cached", "reference.fill": "first_epoch"},
        "adapter_disabled": {"reference.form": "adapter_disabled"},
    },
    "tp": {str(size): {"parallel.tp_size": size} for size in (1, 2, 4)},
    "pp": {str(size): {"parallel.pp_size": size} for size in (1, 2, 4)},
    "vpp": {"none": {}, "2": {"parallel.vpp_size": 2}},
    "cp": {str(size): {"parallel.cp_size": size} for size in (1, 2)},
    "dp": {str(size): {} for size in (1, 2)},
    "sp": {"off": {}, "on": {"parallel.sequence_parallel": True}},
    "rows": {"padded": {}, "packed": {"data.packing": True}, "by length": {"data.group_by_length": True}},
    "micro batch": {str(size): {"trainer.micro_batch_size": size} for size in (1, 2)},
    "reduction": {"after backward": {}, "overlapped": {"optim.overlap_grad_reduce": True}},
    "recompute": {
        "none": {},
        "attention": {"recompute.granularity": "selective"},
        "attention, mlp": {"recompute.granularity": "selective", "recompute.modules": ["core_attn", "mlp"]},
        "layers": {"recompute.granularity": "full"},
        "a layer a stage": {"recompute.granularity": "full", "recompute.method": "block"},
    },
    "loss": {
        "fused": {},
        "fused, 7 tokens": {"loss.chunk_tokens": 7},
        "vocab_parallel": {"loss.implementation": "vocab_parallel"},
        "dense": {"loss.implementation": "dense"},
    },
    "mean": {"of tokens": {}, "of micro batches": {"loss.normalize_by": "micro_batch"}},
    "embeddings": {"untied": {}, "tied": {}},
}
#: what is learned, where it runs, how it is computed: a rule that refuses levels of one block does so whatever the others have
BLOCKS = (
    ("objective", "kl", "adapters", "reference"),
    ("tp", "pp", "vpp", "cp", "dp", "sp", "rows", "micro batch", "reduction"),
    ("recompute", "loss", "mean", "embeddings"),
)
DEFAULTS: Case = {factor: next(iter(levels)) for factor, levels in FACTORS.items()}
CASES_FILE = Path(__file__).with_name("exactness_cases.json")


def world_size(case: Case) -> int:
    """Ranks of a case."""
    return math.prod(int(case[factor]) for factor in SIZES)


def asked_settings(case: Case) -> dict[str, Any]:
    """What somebody who wants this case types."""
    given = {key: value for factor, level in case.items() for key, value in FACTORS[factor][level].items()}
    return {**given, "run.world_size": world_size(case)}


def settings_of_case(case: Case) -> dict[str, Any]:
    """The whole of it but the paths."""
    common = {
        "data.sequence_length": LENGTH,
        "trainer.global_batch_size": BATCH,
        "optim.lr": 3e-3,
        "optim.warmup_ratio": 0.0,
    }
    return {**common, **asked_settings(case)}


def refusal(case: Case) -> str | None:
    """The sentence that a case is refused with, None where it runs. Every setting counts as typed: one that would be ignored is refused."""
    if world_size(case) > RANKS:
        return f"more than {RANKS} ranks"
    run = run_config({**settings_of_case(case), "model.path": "random", "run.dir": "runs/exactness"})
    try:
        rules.check(run, level_of=dict.fromkeys(asked_settings(case), Level.COMMAND_LINE), shape=SHAPE)
    except ConfigError as error:
        return str(error)
    return None


@functools.cache
def allowed(block: tuple[str, ...]) -> list[Case]:
    """The combinations of a block's levels that run with the first levels of all other factors."""
    combinations = (
        dict(zip(block, levels, strict=True)) for levels in itertools.product(*map(FACTORS.__getitem__, block))
    )  # fmt: skip
    return [part for part in combinations if refusal({**DEFAULTS, **part}) is None]


def pairs_of(case: Case) -> set[Pair]:
    """Every two factors with the levels that a case has of them."""
    return set(itertools.combinations(sorted(case.items()), 2))


def all_pairs() -> list[Pair]:
    """Every two levels of different factors."""
    levels = sorted((factor, level) for factor, found in FACTORS.items() for level in found)
    return [pair for pair in itertools.combinations(levels, 2) if pair[0][0] != pair[1][0]]


def is_possible(pair: Pair) -> bool:
    """Whether some combination of the factors of the pair's blocks has both levels and runs."""
    blocks = [block for block in BLOCKS if any(factor in block for factor, _ in pair)]
    parts = [[part for part in allowed(block) if _agrees(part, pair)] for block in blocks]
    return any(
        refusal(DEFAULTS | functools.reduce(dict.__or__, combination)) is None
        for combination in itertools.product(*parts)
    )


def _agrees(part: Case, pair: Pair) -> bool:
    return all(part.get(factor, level) == level for factor, level in pair)


def committed_cases() -> list[Case]:
    """The matrix: cases in the order in which each brings the most new pairs."""
    return [dict(case) for case in json.loads(CASES_FILE.read_text())]


def name_of(case: Case) -> str:
    """What differs from the first levels, in words."""
    return ", ".join(_words(case)) or "all first levels"


def _words(case: Case) -> Iterator[str]:
    for factor, level in case.items():
        if factor == "objective":
            yield level
        elif level != DEFAULTS[factor]:
            yield f"{factor} {level}"
