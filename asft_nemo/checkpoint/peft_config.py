"""`adapter_config.json`: what a PEFT directory says of its adapters, where it is plain LoRA on linear layers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from asft_nemo.errors import CheckpointError

PEFT_CONFIG = "adapter_config.json"

# field -> the values under which it changes nothing of W x + scale * B (A x)
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    # the others (PiSSA, OLoRA, LoftQ, ...) rewrite the base's weights as well
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_READ = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")
_READ_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_SAYS_NOTHING = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
)
# How PEFT itself names its features, for those a user may well have turned on.
_CURES = {
    "use_dora": "train the adapter without DoRA, or merge it into its base and start from that",
    "modules_to_save": "merge the adapter into its base and start from that",
}
_CURE = "only plain LoRA can go on training here; merge the adapter into its base and start from that"


@dataclass(frozen=True)
class PeftDescription:
    """Plain LoRA as PEFT describes it.

    Attributes:
        rank: of modules without one of their own.
        alpha: likewise.
        dropout: in training.
        rslora: the scale is alpha / sqrt(rank) instead of alpha / rank.
        own_ranks: some modules have a rank of their own.
        own_alphas: name, or end of a name, of modules with an alpha of their own -> that alpha.
        targets: names, or ends of names, of the adapted modules; None where a pattern or a choice of layers says it.
    """

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    own_ranks: bool
    own_alphas: Mapping[str, float]
    targets: tuple[str, ...] | None

    def scale(self, module: str, rank: int) -> float:
        """Returns what B A of a module is multiplied with, given its rank."""
        own = (value for key, value in self.own_alphas.items() if named_by(module, key))
        return next(own, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def named_by(module: str, key: str) -> bool:
    """Whether PEFT takes `key` as a name of `module`: the whole of it, or its last parts."""
    return module == key or module.endswith(f".{key}")


def read_peft_config(directory: Path) -> PeftDescription:
    """Returns the description of a PEFT directory.

    Raises:
        CheckpointError: there is none, it is malformed, or it is not plain LoRA.
    """
    path = directory / PEFT_CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{directory} holds no {PEFT_CONFIG}: give the directory that save_pretrained of peft wrote"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("no JSON object")
        config = cast(dict[str, Any], values)
        _check_plain(path, config)
        return _parsed(path, config)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is malformed ({error!r}): copy the adapter again") from error


def _check_plain(path: Path, config: dict[str, Any]) -> None:
    for key, value in config.items():
        if key in (*_READ, *_READ_TARGETS, *_SAYS_NOTHING):
            continue
        fine = value in _PLAIN[key] if key in _PLAIN else not value
        if not fine:
            raise CheckpointError(f"{path} says {key}={json.dumps(value)}: {_CURES.get(key, _CURE)}")


def _parsed(path: Path, config: dict[str, Any]) -> PeftDescription:
    own: Any = config.get("alpha_pattern")
    alphas = {str(key): float(value) for key, value in cast(dict[Any, Any], own or {}).items()}
    patterns = [key for key in alphas if not re.fullmatch(r"[\w.]+", key)]
    if patterns:
        raise CheckpointError(
            f"{path} gives {patterns[0]!r} in alpha_pattern, which is no plain name: name the modules one by one"
        )
    targets = config.get("target_modules")
    plain = isinstance(targets, list) and not any(config.get(key) for key in _READ_TARGETS[1:])
    found = PeftDescription(
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout") or 0.0),
        rslora=bool(config.get("use_rslora")),
        own_ranks=bool(config.get("rank_pattern")),
        own_alphas=alphas,
        targets=tuple(str(name) for name in cast(list[Any], targets)) if plain else None,
    )
    if found.rank < 1 or not all(
        math.isfinite(value) and value > 0 for value in (found.alpha, *alphas.values())
    ):
        raise ValueError(f"r={found.rank}, lora_alpha={found.alpha:g}")
    return found
