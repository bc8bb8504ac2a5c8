"""All parts of `tools/gpu_check.py`, the most telling first: what does not fit the time is left out from the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from asft_nemo.config.machine import FUSED_WEIGHT_GRADIENT
from bench import gpu_cluster, gpu_forms, gpu_loss, gpu_steps, layer_kinds, nemo_convert, outside_fp8
from bench.gpu_form_tables import STEPS_OF_FP8, forms_table, kept_list
from bench.gpu_forms import CHECKED, PRECISIONS
from bench.gpu_parts import (
    NEMO,
    PYTEST,
    TRANSFORMER_ENGINE,
    Bar,
    Part,
    a_gpu,
    clone,
    disk_gib,
    package,
    ranks_at_least,
)

_OF_FP8 = f"1 % after {STEPS_OF_FP8} steps or more"
_FORMS = Part(
    "forms",
    "Peak memory, layers and precisions of every form",
    (NEMO, a_gpu, disk_gib(25)),
    600,
    gpu_forms.check_forms,
    forms_table,
    (
        *(Bar(f"loss_{form}", f"loss of {CHECKED[form].title} off bf16's", _OF_FP8) for form in PRECISIONS),
        *(
            Bar(f"{key}_{form}", f"{what} of {row.title} off Transformer Engine's", f"{bound:.1e}")
            for form, row in layer_kinds.LOCAL_FORMS.items()
            for key, what, bound in (
                ("loss", "losses", layer_kinds.LOSS_OF_LOCAL),
                ("norm", "gradient norms", layer_kinds.NORM_OF_LOCAL),
            )
        ),
        Bar("failed", "forms that failed", "0"),
    ),
)
_OUTSIDE = Part(
    "outside_fp8",
    "What an FP8 run leaves out of FP8",
    (NEMO, a_gpu, TRANSFORMER_ENGINE),
    90,
    gpu_forms.check_outside,
    lambda found: outside_fp8.table(found["outside"]),
    (Bar("off", "precisions with head, embedding or loss in FP8", "0"),),
)
_KEPT = Part(
    "kept",
    "Left behind for tests",
    (NEMO, a_gpu),
    90,
    gpu_forms.check_kept,
    kept_list,
    (Bar("failed", "files that could not be made", "0"),),
)
_CONVERSION = Part(
    "conversion",
    "Conversion beside NeMo's own",
    (NEMO,),
    90,
    gpu_forms.check_conversion,
    lambda found: (
        "Each in a process of its own, imports and start included; the random model of the forms.\n\n"
        + nemo_convert.table(found["conversion"])
    ),
    (Bar("failed", "conversions of ours that failed", "0", on_gpu=False),),
)

ONE_GPU: tuple[Part, ...] = (
    gpu_loss.KERNELS,
    gpu_loss.LOSS,
    *gpu_steps.PARTS,
    _FORMS,
    _OUTSIDE,
    _KEPT,
    _CONVERSION,
)


def _table(columns: dict[str, str]) -> Callable[[Mapping[str, Any]], str]:
    return lambda found: gpu_cluster.rows_table(found["rows"], columns)


_FAILED = Bar("failed", "runs that failed", "0", on_gpu=False)
_STACK = (NEMO, clone, PYTEST)
_EXACT_COLUMNS = {"error": "error", "where": "largest in"}
_BF16_COLUMNS = {"error": "error", "plain": "plain PyTorch's", "of_plain": "of it"}

SEVERAL: tuple[Part, ...] = (
    Part(
        "collectives",
        "Collectives: right, and how fast",
        (ranks_at_least(2),),
        40,
        gpu_cluster.check_collectives,
        _table({"right": "result", "gb_per_second": "GB/s over the busiest link, slowest rank"}),
        (Bar("wrong", "collectives with a wrong result", "0", on_gpu=False),),
    ),
    Part(
        "gradients",
        "Gradients of a step in fp32 at every layout against fp64",
        _STACK,
        100,
        lambda check: gpu_cluster.check_gradients(gpu_cluster.LAYOUTS, check),
        _table({**_EXACT_COLUMNS, "loss_error": "error of the loss"}),
        (Bar("error", "worst gradient error of any layout", "1e-5", on_gpu=False), _FAILED),
    ),
    Part(
        "checkpoint",
        "Checkpoints saved and loaded across layouts",
        _STACK,
        70,
        gpu_cluster.check_checkpoint,
        _table({"difference": "losses and norms apart by"}),
        (Bar("difference", "losses and norms after a resume elsewhere", "1e-5", on_gpu=False), _FAILED),
    ),
    Part(
        "gradients_bf16",
        "The same in bf16, in training's own layers",
        _STACK,
        80,
        lambda check: gpu_cluster.check_bf16(gpu_cluster.LAYOUTS, check),
        _table(_BF16_COLUMNS),
        (Bar("of_plain", "error over plain PyTorch's in bf16", "1.5", on_gpu=False), _FAILED),
    ),
    Part(
        "overlap",
        "Overlapped communication against none",
        _STACK,
        80,
        gpu_cluster.check_overlap,
        _table({"difference": "losses and norms apart by", "of_bound": "of its bound"}),
        (Bar("of_bound", "difference over its bound (1e-6; in bf16 2^-8)", "1", on_gpu=False), _FAILED),
    ),
    Part(
        "main_grad",
        "Weight gradients added inside the GEMM",
        (a_gpu, *_STACK, package(FUSED_WEIGHT_GRADIENT, called="apex's kernel")),
        60,
        gpu_cluster.check_main_grad,
        _table(_EXACT_COLUMNS),
        (Bar("error", "difference to gradients added afterwards", "1e-5"), _FAILED),
    ),
    Part(
        "fp8_tp2",
        "FP8 at TP2 beside bf16",
        (a_gpu, *_STACK, TRANSFORMER_ENGINE),
        60,
        gpu_cluster.check_fp8,
        _table({"loss": "loss", "difference": "of bf16's apart by"}),
        (Bar("difference", "loss off bf16's", _OF_FP8), _FAILED),
    ),
    Part(
        "context",
        "Context parallelism in fp32 against fp64",
        _STACK,
        50,
        lambda check: gpu_cluster.check_gradients(gpu_cluster.CONTEXT_LAYOUTS, check),
        _table({**_EXACT_COLUMNS, "loss_error": "error of the loss"}),
        (Bar("error", "worst gradient error", "1e-5", on_gpu=False), _FAILED),
    ),
    Part(
        "context_ring",
        "Context parallelism in Transformer Engine's ring, bf16",
        (a_gpu, *_STACK, TRANSFORMER_ENGINE),
        50,
        lambda check: gpu_cluster.check_bf16(gpu_cluster.CONTEXT_LAYOUTS, check),
        _table(_BF16_COLUMNS),
        (Bar("of_plain", "error over plain PyTorch's in bf16", "1.5"), _FAILED),
    ),
)


def promises() -> str:
    """Every bar of every part as Markdown, as docs/gpu_check.md has it while nothing was measured."""
    lines = ["| part | what is measured | at most | on an H100 or H200 |", "| --- " * 4 + "|"]
    for part in (*ONE_GPU, *SEVERAL):
        lines += [f"| `{part.name}` | {bar.what} | {bar.bound} | unmeasured |" for bar in part.bars]
    return "\n".join(lines)
