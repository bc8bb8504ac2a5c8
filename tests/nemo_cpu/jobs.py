"""What the ranks do for the tests in this folder. Every function is called on all ranks with JSON arguments."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
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
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return self.size

    @property
    def sample_ids(self) -> np.ndarray:
        return np.arange(self.size)

    def learned_tokens(self, sample_ids: Iterable[int]) -> int:
        return sum(int(self[sample]["loss_mask"].sum()) for sample in sample_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 + index)
        tokens = torch.randint(0, VOCAB, (self.length + 1,), generator=generator)
        mask = torch.zeros(self.length, dtype=torch.bool)
        if index >= 0:
            mask[torch.randperm(self.length, generator=generator)[: self.valid[index % len(self.valid)]]] = (
                True
            )
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": mask,
            "position_ids": torch.arange(self.length),
            "sample_id": torch.tensor(index),
        }


class ShortTokens(RandomTokens):
    """Examples of 3 to 29 tokens, padded: what can be packed."""

    SIZES = (5, 9, 14, 3, 29, 4)

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray([self.SIZES[index % len(self.SIZES)] for index in range(self.size)])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        item["loss_mask"][0 if index < 0 else self.lengths[index] :] = False
        return item


def examples(run: Any, size: int, valid: list[int]) -> Dataset:
    """Random examples of the run's sequence length, packed where it says so; of several lengths where it groups them."""
    from asft_nemo.data import PackedDataset
    from asft_nemo.data.context_slices import segment_multiple

    given = {"size": size, "sequence_length": run.data.sequence_length, "valid": valid}
    if run.data.group_by_length:
        return ShortTokens(**given)
    if not run.data.packing:
        return RandomTokens(**given)
    return PackedDataset(ShortTokens(**given), multiple_of=segment_multiple(run.parallel.cp_size))


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
    settings: dict[str, Any],
    *,
    valid: list[int],
    callbacks: tuple[Any, ...] = (),
    size: int = 64,
    validation: int = 0,
) -> Any:
    """Trains on random tokens with the production parts; returns them."""
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
        open_run_dir(run, data_fingerprint="random tokens").release()
    data = SimpleNamespace(
        train=examples(run, size, valid),
        validation=examples(run, validation, valid) if validation else None,
        max_steps=run.trainer.max_steps,
        fingerprint="random tokens",
    )
    parts = build(
        run,
        spec=read_model_spec(base_dir / "context" / "hf"),
        base_dir=base_dir,
        data=data,
        resume=resume,
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

    def __new__(cls, out: Path, *, of_step: int) -> Any:
        from lightning.pytorch import Callback

        class Keep(Callback):
            def on_megatron_step_end(self, step: Any) -> None:
                if not step.forward_only and step.step_i == of_step - 1:
                    save_gradients(step.trainer.strategy.megatron_parallel, out)

        return Keep()


def save_gradients(parallel: Any, out: Path) -> None:
    """Writes every parameter's `main_grad` of all ranks to `out/weights`, in the layout-free form of a checkpoint."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    gradients = {
        p.data_ptr(): p.main_grad for chunk in parallel for p in chunk.parameters() if p.requires_grad
    }
    states = {}
    for index, chunk in enumerate(parallel):
        state = parallel._module_sharded_state_dict(chunk)
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
    """Two steps: the first moves the policy away from the reference and is kept as a checkpoint, the second's gradients go to `out`.

    Returns the second step's logged means (where this rank has them).
    """
    settings = {**settings, "trainer.max_steps": 2, "trainer.checkpoint_every": 1, "trainer.keep": "last:2"}
    parts = fit(settings, valid=valid, callbacks=(KeepGradients(Path(out), of_step=2),))
    if is_first_rank():
        shutil.copytree(
            Path(settings["run.dir"]) / "base" / "context",
            Path(out) / "context",
            ignore=shutil.ignore_patterns("seal.json"),  # which is of the base's own weights
        )
    return dict(parts.model.training_loss_reduction.last)


def train_steps(settings: dict[str, Any], *, valid: list[int], validation: int = 0) -> None:
    """Trains; what a test looks at is in the run's folder."""
    fit(settings, valid=valid, validation=validation)


def resume_with_an_old_link(settings: dict[str, Any], *, valid: list[int], found: list[int | None]) -> str:
    """Resumes where each rank sees the checkpoint of another step, None for none yet; returns what is said against it."""
    import os

    from asft_nemo import run_dir
    from asft_nemo.errors import CheckpointError

    step = found[int(os.environ["RANK"])]
    seen = None if step is None else Path(settings["run.dir"]) / "checkpoints" / f"step_{step}"
    run_dir.resume_from = lambda run: seen
    try:
        fit(settings, valid=valid)
    except CheckpointError as error:
        return str(error)
    return ""


def megatron_logits(settings: dict[str, Any], *, out: str) -> None:
    """One training step's policy at step 0: its logits of examples 0 to 3, gathered over tensor-parallel ranks, saved by one rank."""
    from lightning.pytorch import Callback
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    data = RandomTokens(size=64, sequence_length=32, valid=[32])

    class Forward(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            chunks = list(trainer.strategy.megatron_parallel)
            items = [data[index] for index in range(4)]

            def step(iterator: Any, model: Any) -> Any:
                item = next(iterator)
                logits = model(item["tokens"][None], item["position_ids"][None])
                return logits, lambda output, non_loss_data: output.detach()

            with torch.no_grad():
                found = get_forward_backward_func()(
                    forward_step_func=step,
                    data_iterator=iter(items) if len(chunks) == 1 else [iter(items) for _ in chunks],
                    model=chunks[0] if len(chunks) == 1 else chunks,
                    num_microbatches=4,
                    seq_length=32,
                    micro_batch_size=1,
                    forward_only=True,
                    collect_non_loss_data=True,
                )
            if found:
                whole = gather_from_tensor_model_parallel_region(torch.cat(found))[..., :VOCAB]
                if parallel_state.get_tensor_model_parallel_rank() == 0:
                    torch.save(whole, out)

    fit(settings, valid=[32], callbacks=(Forward(),))


def train_and_die(settings: dict[str, Any], *, valid: list[int], after_step: int) -> None:
    """Trains and raises on every rank after a step, as a killed job would end between checkpoints. The ranks live on: starting them
    takes longer than the test.
    """
    from lightning.pytorch import Callback

    class StoppedError(Exception):
        pass

    class Die(Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            if trainer.global_step == after_step:
                raise StoppedError

    try:
        fit(settings, valid=valid, callbacks=(Die(),))
    except StoppedError:
        return
    raise AssertionError(f"the run did not reach step {after_step}")


def train_itself(settings: dict[str, Any]) -> None:
    """`asft_nemo.train.train`, as torchrun or NeMo-Run call it: no launcher of ours has prepared anything."""
    import os

    from asft_nemo import run_dir
    from asft_nemo.train import train

    os.environ.pop("ASFT_LAUNCHER_PID", None)
    try:
        train(run_config(settings))
    finally:
        while run_dir._held:  # which a process of its own would let go by ending
            run_dir._held.pop().release()


def means_of_steps(settings: dict[str, Any]) -> list[Any]:
    """What this rank's training reduction holds after each step: means and means of domains; None where it knows no loss."""
    from asft_nemo.nemo.callbacks import MetricsCallback

    found: list[Any] = []
    original = MetricsCallback.on_train_batch_end

    def kept(self: Any, trainer: Any, pl_module: Any, *rest: Any) -> None:
        reduction = pl_module.training_loss_reduction
        found.append([reduction.last, reduction.last_of_domains] if reduction.last else None)
        original(self, trainer, pl_module, *rest)

    MetricsCallback.on_train_batch_end = kept  # type: ignore[method-assign]
    try:
        train_itself(settings)
    finally:
        MetricsCallback.on_train_batch_end = original  # type: ignore[method-assign]
    return found


def widths_of_micro_batches(settings: dict[str, Any]) -> list[int]:
    """Trains as `train_itself`; the tokens of a row of every micro batch this rank took."""
    from asft_nemo.nemo import schedule

    found: list[int] = []
    original = schedule.data_step

    def seen(iterator: Any) -> dict[str, Any]:
        batch = original(iterator)
        found.append(batch["tokens"].shape[1])
        return batch

    schedule.data_step = seen
    try:
        train_itself(settings)
    finally:
        schedule.data_step = original
    return found


def refusal(settings: dict[str, Any]) -> str:
    """The sentence a run is refused with, on every rank."""
    from asft_nemo.errors import UserError

    try:
        train_itself(settings)
    except UserError as error:
        return str(error)
    raise AssertionError("the run was not refused")


def with_own_data(settings: dict[str, Any], *, files: list[str], job: str) -> str:
    """Each rank has its own file of examples, as machines without a common file system have; what the job is refused with, if it is.

    Args:
        files: of the ranks.
        job: ``train`` or ``cache``.
    """
    import os

    from asft_nemo.errors import DataError
    from asft_nemo.train import cache_reference

    own = {**settings, "data.train": [files[int(os.environ["RANK"])]]}
    try:
        if job == "train":
            train_itself(own)
        else:
            os.environ.pop("ASFT_LAUNCHER_PID", None)
            cache_reference(run_config(own), repair=False)
    except DataError as error:
        return str(error)
    return ""
