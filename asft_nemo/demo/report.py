"""What report.json holds; the page is drawn from the same values, so the two cannot disagree."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from asft_nemo.config.schema import RunConfig
from asft_nemo.demo import skills
from asft_nemo.demo.figures import (
    KL_DIRECTIONS,
    Estimate,
    Group,
    accuracy,
    drift,
    drift_difference,
    new_difference,
    old_accuracy,
    old_difference,
)
from asft_nemo.demo.plan import MAX_NEW_TOKENS, Plan
from asft_nemo.demo.verdict import TITLES, Verdict, status

FORMAT = 1
METRICS = ("nll", "weighted_nll", "kl", "token_weight")

Steps = Sequence[Mapping[str, Any]]
"""The lines of one run's metrics.jsonl."""


def measurements(groups: Mapping[str, Group], verdict: Verdict) -> dict[str, Any]:
    """The measured part: verdict, a figure for every model and measure, and the paired differences.

    Args:
        groups: "base" first, then every objective.
        verdict: on these groups.
    """
    base = groups["base"]
    return {
        "outcome": verdict.outcome,
        "headline": verdict.headline,
        "details": verdict.details,
        "claims": [{**asdict(claim), "difference": _estimate(claim.difference)} for claim in verdict.claims],
        "skills": {
            "new": base.new_skill,
            "old": list(base.old_skills),
            "tests": {name: len(base.models[0].scores[name]) for name in (base.new_skill, *base.old_skills)},
        },
        "text": {
            "blocks": len(base.models[0].drift),
            "texts": sum(block.num_texts for block in base.models[0].drift),
            "tokens": sum(block.num_tokens for block in base.models[0].drift),
        },
        "models": {name: _model(group, base) for name, group in groups.items()},
        "differences": [_difference(groups[one], groups[other]) for one, other in _pairs(list(groups))],
    }


def _model(group: Group, base: Group) -> dict[str, Any]:
    return {
        "title": TITLES[group.name],
        "new": _estimate(accuracy(group, group.new_skill)),
        "old": _estimate(old_accuracy(group)),
        "forgotten": None if group is base else _estimate(old_difference(base, group)),
        "skills": {name: _estimate(accuracy(group, name)) for name in (group.new_skill, *group.old_skills)},
        **{direction: _estimate(drift(group, direction)) for direction in KL_DIRECTIONS},
    }


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    """Every objective against sft, and asft against every other one."""
    others = [name for name in names if name not in ("base", "sft", "asft")]
    return [("asft", "sft"), *((name, "sft") for name in others), *(("asft", name) for name in others)]


def _difference(one: Group, other: Group) -> dict[str, Any]:
    found = {
        "new": new_difference(one, other),
        "old": old_difference(one, other),
        "forward_kl": drift_difference(one, other),
    }
    return {
        "one": one.name,
        "other": other.name,
        **{name: {**_estimate(gap), "clear": status(gap, 0.0) != "undecided"} for name, gap in found.items()},
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {**asdict(estimate), "per_seed": list(estimate.per_seed)}


def training(metrics: Mapping[str, Sequence[Steps]]) -> dict[str, Any]:
    """Per objective: seconds a step, the KL before the first update, and the last step's values.

    Args:
        metrics: objective -> the metrics of each seed's run.
    """
    return {
        objective: {
            "seconds_a_step": _median(runs, "seconds"),
            "reference_seconds_a_step": _median(runs, "reference_seconds"),
            "first_kl": [run[0]["kl"] for run in runs],
            "tokens": [sum(line["tokens"] for line in run) for run in runs],
            "last": {key: [run[-1][key] for run in runs] for key in METRICS},
        }
        for objective, runs in metrics.items()
    }


def _median(runs: Sequence[Steps], key: str) -> float:
    return statistics.median(line[key] for run in runs for line in run)


def series(metrics: Mapping[str, Sequence[Steps]], key: str) -> dict[str, list[list[float]]]:
    """One metric of every objective that has it, seed by seed, step by step."""
    return {
        objective: [[line[key] for line in run] for run in runs]
        for objective, runs in metrics.items()
        if all(line[key] is not None for run in runs for line in run)
    }


def protocol(plan: Plan, run: RunConfig, words: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """How the figures came about.

    Args:
        plan: sizes and seeds.
        run: one of the runs; what is read of it is the same in all.
        words: objective -> the arguments of `asft train` for its first seed.
    """
    layout, optim = run.parallel, run.optim
    return {
        "objectives": list(plan.objectives),
        "seeds": list(plan.seeds),
        "steps": plan.steps,
        "global_batch_size": plan.global_batch_size,
        "micro_batch_size": plan.micro_batch_size,
        "examples": plan.examples,
        "wrong_share": skills.WRONG_SHARE,
        "sequence_length": plan.sequence_length,
        "lr": optim.lr,
        "schedule": optim.schedule,
        "warmup_ratio": optim.warmup_ratio,
        "weight_decay": optim.weight_decay,
        "clip_grad": optim.clip_grad,
        "kl_weight": plan.kl_weight,
        "kl_direction": run.objective.kl_direction,
        "reference": "resident",
        "precision": run.precision,
        "loss": run.loss.implementation,
        "tp_size": layout.tp_size,
        "pp_size": layout.pp_size,
        "world_size": run.run.world_size,
        "evaluation": {
            "backend": "hf",
            "protocol": "greedy",
            "grader": "exact_match",
            "max_tokens": MAX_NEW_TOKENS,
        },
        "commands": {objective: ["asft", "train", *arguments] for objective, arguments in words.items()},
    }


def machine() -> dict[str, Any]:
    """What the demo ran on."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
