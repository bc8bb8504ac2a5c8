"""The forms that `tools/gpu_check.py` trains, and what they need of the machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from bench.layer_kinds import LOCAL_FORMS
from bench.training import FORMS, Form

log = logging.getLogger("gpu_check")

# A random model's KL at step 0 says nothing of a trained one's, so the bound is out of the way; the KL itself is in the table.
_FP8 = ("objective=asft", "reference=resident", "reference.precision=fp8", "reference.max_initial_kl=1000")
_LORA_FP8 = (
    "objective=asft",
    "peft=lora",
    "optim.lr=5e-4",
    "reference=adapter_disabled",
    "precision=fp8_current",
)
# The policy itself in FP8, each beside the same run in bf16
PRECISIONS = {
    **{
        f"sft_{name}": Form(f"sft, precision={name}", ("objective=sft", f"precision={name}"), "sft")
        for name in ("fp8_current", "fp8_blockwise", "fp8_delayed")
    },
    "resident_fp8_current": Form(
        "asft, resident, precision=fp8_current",
        ("objective=asft", "reference=resident", "precision=fp8_current"),
        "resident",
    ),
    "lora_fp8_current": Form("LoRA asft, precision=fp8_current", _LORA_FP8, "lora_adapter_disabled"),
}
PROFILED = Form(
    "asft, resident, profiled", ("objective=asft", "reference=resident", "trainer.profile=steps:3-4"), "sft"
)
CHECKED = {
    **FORMS,
    "resident_profiled": PROFILED,
    **LOCAL_FORMS,
    "resident_fp8": Form("asft, resident in FP8", _FP8, "sft"),
    **PRECISIONS,
}


def lacks(settings: Iterable[str]) -> str | None:
    """What this machine has not of what these settings need, in words."""
    from asft_nemo.config.fp8 import FP8, fp8_missing
    from asft_nemo.config.machine import part

    for name in (name for name, row in FP8.items() if f"{row.key}={name}" in settings):
        if (missing := fp8_missing(name)) is not None:
            return missing
    there = part("transformer_engine").there()
    return None if there or "kernels.layers=local" not in settings else "Transformer Engine to compare with"


def attempt(what: str, settings: Iterable[str], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` finds, or why it was `skipped` or `failed`."""
    if (missing := lacks(settings)) is not None:
        return {"skipped": f"no {missing}"}
    try:
        return work()
    except Exception as error:
        log.exception("%s", what)
        return {"failed": f"{type(error).__name__}: {error}"}
