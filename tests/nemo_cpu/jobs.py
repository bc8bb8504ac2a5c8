"""What the ranks do for the tests in this folder. Every function is called on all ranks with JSON arguments."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

VOCAB = 500  # not a multiple of 128: the vocabulary is padded


class RandomTokens(Dataset):
    """Examples made from their index: random tokens, a random mask, and very unequal numbers of valid tokens.

    Example i has ``valid[i % len(valid)]`` valid tokens, so a micro batch without any is part of the set. Index -1 is a filler.
    """

    def __init__(self, *, size: int, sequence_length: int, valid: list[int]):
        self.size, self.length, self.valid = size, sequence_length, valid

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 + index)
        tokens = torch.randint(0, VOCAB, (self.length + 1,), generator=generator)
        mask = torch.zeros(self.length, dtype=torch.bool)
        if index >= 0:
            mask[torch.randperm(self.length, generator=generator)[: self.valid[index % len(self.valid)]]] = True
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": mask,
            "position_ids": torch.arange(self.length),
            "sample_id": torch.tensor(index),
        }


def run_config(settings: dict[str, Any]) -> Any:
    """A RunConfig from flat ``section.key`` settings over the tests' common ones."""
    from asft_nemo.config.schema import from_dict

    common: dict[str, Any] = {
        "recipe": "tiny_cpu",
        "reference.form": "resident",
        "peft.name": "none",
        "precision": "fp32",
        "cluster.name": "local",
        "data.sequence_length": 32,
        "optim.lr": 1e-3,
        "trainer.max_steps": 1,
        "trainer.global_batch_size": 8,
    }
    nested: dict[str, Any] = {}
    for key, value in {**common, **settings}.items():
        *path, last = key.split(".")
        holder = nested
        for part in path:
            holder = holder.setdefault(part, {})
        holder[last] = value
    return from_dict(nested)


def fit(
    settings: dict[str, Any], *, valid: list[int], callbacks: tuple[Any, ...] = (), size: int = 64, validation: int = 0
) -> Any:
    """Trains on random tokens with the production parts; returns them."""
    from asft_nemo.cpu import backend

    backend.install()
    torch.set_num_threads(1)
    from asft_nemo.logs import set_up_logging
    from asft_nemo.model import read_model_spec
    from asft_nemo.nemo.build import build
    from asft_nemo.run_dir import base_checkpoint, open_run_dir, resume_from

    run = run_config(settings)
    set_up_logging(rank=torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    base_dir = base_checkpoint(run)
    resume = resume_from(run)
    if is_first_rank():
        open_run_dir(run, data_fingerprint="random tokens")
    length = run.data.sequence_length
    data = SimpleNamespace(
        train=RandomTokens(size=size, sequence_length=length, valid=valid),
        validation=RandomTokens(size=validation, sequence_length=length, valid=valid) if validation else None,
        max_steps=run.trainer.max_steps,
    )
    parts = build(
        run, spec=read_model_spec(base_dir / "context" / "hf"), base_dir=base_dir, data=data, resuming=resume is not None
    )
    parts.trainer.callbacks.extend(callbacks)
    parts.trainer.fit(parts.model, datamodule=parts.data, ckpt_path=None if resume is None else str(resume))
    return parts


def is_first_rank() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


class KeepGradients:
    """Saves the finished gradients, before the optimizer, as a distributed checkpoint under the parameters' names.

    Export then turns them into tensors under Hugging Face names: every layout is compared in the same form.
    """

    def __new__(cls, out: Path) -> Any:
        from lightning.pytorch import Callback

        class Keep(Callback):
            def on_megatron_step_end(self, step: Any) -> None:
                if not step.forward_only:
                    save_gradients(step.pipeline, out)

        return Keep()


def save_gradients(pipeline: Any, out: Path) -> None:
    """Writes every parameter's `main_grad` of all ranks to `out/weights`, in the layout-free form of a checkpoint."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    gradients = {p.data_ptr(): p.main_grad for chunk in pipeline for p in chunk.parameters()}
    states = {}
    for index, chunk in enumerate(pipeline):
        state = pipeline._module_sharded_state_dict(chunk)
        for value in state.values():
            if isinstance(value, ShardedTensor | ShardedTensorFactory):
                value.data = gradients[value.data.data_ptr()].clone()
        states[f"chunk_{index}"] = state
    if is_first_rank():
        shutil.rmtree(out, ignore_errors=True)
        (out / "weights").mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(states, str(out / "weights"))


def gradients(settings: dict[str, Any], *, valid: list[int], out: str) -> dict[str, float]:
    """One step; gradients go to `out`. Returns the step's logged means (where this rank has them)."""
    keep = KeepGradients(Path(out))
    parts = fit(settings, valid=valid, callbacks=(keep,))
    return dict(parts.model.training_loss_reduction.last)
