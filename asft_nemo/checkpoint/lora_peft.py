"""Adapters as a directory that `peft.PeftModel.from_pretrained(base_model, directory)` loads.

PEFT has an adapter for each of the linear layers that Megatron fuses. Query, key and value projection get the same A, which they share
in linear_qkv, and each their rows of B; gate and up projection likewise. Nothing is computed: the numbers are the checkpoint's own.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from asft_nemo.checkpoint import hf_files
from asft_nemo.checkpoint.adapters import AdapterDescription, AdapterReader
from asft_nemo.checkpoint.base_weights import own_files, recorded_base
from asft_nemo.checkpoint.blocks import Progress, ProgressCounter
from asft_nemo.checkpoint.convert import ExportReport
from asft_nemo.checkpoint.families import hf_name
from asft_nemo.checkpoint.peft_adapter import PEFT_WEIGHTS
from asft_nemo.checkpoint.peft_config import PEFT_CONFIG
from asft_nemo.checkpoint.shards import OutRows, write_shards
from asft_nemo.checkpoint.staging import staged_directory, write_synced
from asft_nemo.model import read_model_spec

logger = logging.getLogger(__name__)


def peft_name(weight: str, side: str) -> str:
    """Returns PEFT's name of the A or B of a Hugging Face weight."""
    return f"base_model.model.{weight.removesuffix('.weight')}.lora_{side}.weight"


def export_peft(
    ckpt_dir: str | Path,
    out_dir: str | Path,
    *,
    base_dir: str | Path | None = None,
    base_name: str | None = None,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        ckpt_dir: a checkpoint of a run with `peft=lora`; the weights of its base are not needed.
        out_dir: directory to create; it appears complete or not at all.
        base_dir: Hugging Face directory of the base, needed only where the checkpoint does not hold the base's files.
        base_name: what PEFT calls the base, a path or a name on the hub; None takes `base_dir`, else the run's model.path.
        dtype: dtype to write; None takes the adapters' own.
        progress: called with (bytes done, bytes in all, tensor).

    Raises:
        CheckpointError: the checkpoint holds no adapters, or the target cannot be written.
    """
    started = time.monotonic()
    ckpt_dir, out_dir = Path(ckpt_dir), Path(out_dir)
    wanted = None if dtype is None else hf_files.parse_dtype(dtype)
    spec = read_model_spec(own_files(ckpt_dir, base_dir))
    with AdapterReader(ckpt_dir, spec) as adapters:
        out: dict[str, OutRows] = {}
        part_of: dict[str, tuple[str, str, int]] = {}
        for layer in range(spec.num_layers):
            for target, mapping in adapters.mappings.items():
                own, columns = adapters.dtype(target), adapters.a(target, layer).shape[1]
                for template, shape in mapping.hf_shapes().items():
                    for side, size in (("A", (shape[1], columns)), ("B", shape)):
                        name = peft_name(hf_name(template, layer), side)
                        out[name] = OutRows(wanted or own, size, own.itemsize)
                        part_of[name] = (target, template, layer)

        def produce(name: str, start: int, stop: int) -> torch.Tensor:
            target, template, layer = part_of[name]
            if name.endswith(".lora_A.weight"):
                return adapters.a(target, layer)[start:stop].to(out[name].dtype)
            return adapters.b_rows(target, template, layer, start, stop).to(out[name].dtype)

        nbytes = sum(rows.nbytes for rows in out.values())
        base = base_name or (str(base_dir) if base_dir is not None else recorded_base(ckpt_dir))
        modules = {template.removesuffix(".weight").rpartition(".")[2] for _, template, _ in part_of.values()}
        config = _config(adapters.description, sorted(modules), base)
        with staged_directory(out_dir, needed_bytes=nbytes) as staging:
            write_synced(
                staging / PEFT_CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
            )
            write_shards(staging, {PEFT_WEIGHTS: list(out)}, out, produce, ProgressCounter(progress, nbytes))
    logger.info("wrote the adapters of %s to %s", ckpt_dir, out_dir)
    return ExportReport(
        path=out_dir,
        family=spec.family,
        num_tensors=len(out),
        nbytes=nbytes,
        dtype=Counter(rows.dtype for rows in out.values()).most_common(1)[0][0],
        seconds=time.monotonic() - started,
        files=(PEFT_CONFIG,),
        shards=1,
    )


def _config(adapters: AdapterDescription, modules: list[str], base: str | None) -> dict[str, Any]:
    """What PEFT needs to know, and what decides the function stated even where it is PEFT's default."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapters.rank,
        "lora_alpha": int(adapters.alpha) if adapters.alpha.is_integer() else adapters.alpha,
        "lora_dropout": adapters.dropout,
        "target_modules": modules,
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
