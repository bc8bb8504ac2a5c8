"""Checkpoints of random adapters, and what they mean, written out by hand; no conversion of ours takes part in the latter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hf_cases import FFN, GROUPS, HEAD_DIM, HEADS, HIDDEN, LAYERS, tensors_of, write_hf

from asft_nemo.checkpoint.adapters import AdapterDescription
from asft_nemo.checkpoint.dist_write import OutTensor, write_dist_checkpoint
from asft_nemo.checkpoint.hf_files import copy_hf_files

QKV = (HEADS + 2 * GROUPS) * HEAD_DIM
SIZES = {
    "linear_qkv": ("self_attention", QKV, HIDDEN),
    "linear_proj": ("self_attention", HIDDEN, HEADS * HEAD_DIM),
    "linear_fc1": ("mlp", 2 * FFN, HIDDEN),
    "linear_fc2": ("mlp", HIDDEN, FFN),
}


def finite(dtype: torch.dtype = torch.float32, *, tied: bool = False) -> dict[str, torch.Tensor]:
    """Returns a base's tensors that a model can compute with."""
    tensors = tensors_of(tied=tied, dtype=dtype)
    tensors["model.norm.weight"].nan_to_num_(posinf=1.0)
    for tensor in tensors.values():
        if tensor.dim() == 2:
            tensor.mul_(0.2)
    return tensors


def write_base(
    directory: Path, dtype: torch.dtype = torch.float32, *, tied: bool = False
) -> dict[str, torch.Tensor]:
    """Writes a Hugging Face checkpoint that computes finite numbers; returns its tensors."""
    return write_hf(directory, dtype=dtype, tied=tied, files=2, tensors=finite(dtype, tied=tied))


def write_adapters(
    folder: Path,
    base: Path,
    *,
    adapters: AdapterDescription,
    dtype: torch.dtype = torch.float32,
    recorded: str | None = None,
    objects: tuple[str, ...] = (),
) -> dict[str, torch.Tensor]:
    """Writes a checkpoint as a run with LoRA leaves it; returns its tensors by name."""
    torch.manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for target in adapters.targets:
        parent, rows, columns = SIZES[target]
        name = f"module.decoder.layers.{parent}.{target}.adapter"
        tensors[f"{name}.linear_in.weight"] = torch.randn(LAYERS, adapters.rank, columns).to(dtype)
        tensors[f"{name}.linear_out.weight"] = 0.1 * torch.randn(LAYERS, rows, adapters.rank).to(dtype)
    moments = {f"optimizer.state.exp_avg.{key}": torch.full_like(value, 7) for key, value in tensors.items()}
    stored = tensors | moments
    write_dist_checkpoint(
        folder / "weights",
        [OutTensor(key, value.dtype, LAYERS, tuple(value.shape[1:])) for key, value in stored.items()],
        objects=objects,
        produce=lambda key, layer, start, stop: stored[key][layer, start:stop].clone(),
        block_bytes=500,
        threads=1,
    )
    copy_hf_files(base, folder / "context" / "hf")
    (folder / "context" / "adapter.json").write_text(adapters.to_json())
    (folder / "context" / "run.json").write_text(json.dumps({"base": recorded or str(base)}))
    return tensors


def updates(tensors: dict[str, torch.Tensor], adapters: AdapterDescription) -> dict[str, torch.Tensor]:
    """Returns alpha / rank * B A in fp64 under Hugging Face names: 4 heads of 8 in 2 groups, each group's queries, key, value in turn."""
    result: dict[str, torch.Tensor] = {}
    for target in adapters.targets:
        parent, _, _ = SIZES[target]
        name = f"module.decoder.layers.{parent}.{target}.adapter"
        a, b = (tensors[f"{name}.linear_{side}.weight"].double() for side in ("in", "out"))
        update = adapters.alpha / adapters.rank * b @ a
        if target == "linear_qkv":
            groups = update.unflatten(1, (2, 4, 8))
            parts = {
                "self_attn.q_proj": groups[:, :, :2].flatten(1, 3),
                "self_attn.k_proj": groups[:, :, 2].flatten(1, 2),
                "self_attn.v_proj": groups[:, :, 3].flatten(1, 2),
            }
        elif target == "linear_fc1":
            parts = {"mlp.gate_proj": update[:, :FFN], "mlp.up_proj": update[:, FFN:]}
        else:
            parts = {{"linear_proj": "self_attn.o_proj", "linear_fc2": "mlp.down_proj"}[target]: update}
        for part, values in parts.items():
            result |= {f"model.layers.{layer}.{part}.weight": value for layer, value in enumerate(values)}
    return result
