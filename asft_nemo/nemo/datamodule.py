"""The data module: our datasets and sampler behind NeMo's data-sampler interface."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader, Dataset

from asft_nemo.data import GlobalBatchSampler, Order, PackedDataset, SequentialBatchSampler
from asft_nemo.data.grouping import PaddedToLongest


class AnchoredDataSampler(MegatronDataSampler):
    """NeMo's sampler for batch sizes and step bookkeeping; the order of examples is our batch sampler's, already in the loader."""

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        """The loader as it is: its batch sampler yields this data-parallel rank's micro batches."""
        return dataloader

    def on_megatron_step_end(self, step: Any) -> None:
        """Nothing: batch sizes are constant and consumed samples follow from the step."""


class AnchoredDataModule(pl.LightningDataModule):
    """Feeds micro batches of `global_batch_size` examples a step, resumable from the number of consumed examples.

    Args:
        train: items are dicts of fixed-length tensors, see `asft_nemo.data.SupervisedDataset`.
        validation: the same, or None.
        sequence_length: tokens of every item.
        micro_batch_size, global_batch_size: examples.
        order: in which training items are taken.
        padding_multiple: where given, a training micro batch is padded to a multiple of it that its longest item needs.
    """

    def __init__(
        self,
        train: Dataset,
        validation: Dataset | None,
        *,
        sequence_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        order: Order,
        padding_multiple: int | None,
    ):
        super().__init__()
        self.train, self.validation = train, validation
        self.micro_batch_size, self.global_batch_size, self.order = micro_batch_size, global_batch_size, order
        self._padding_multiple = padding_multiple
        self.consumed_samples = 0
        self.data_sampler = AnchoredDataSampler(
            seq_len=sequence_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            dataloader_type="single",
            output_log=False,
        )

    def _ranks(self) -> dict[str, int]:
        return {
            "micro_batch_size": self.micro_batch_size,
            "global_batch_size": self.global_batch_size,
            "dp_rank": parallel_state.get_data_parallel_rank(),
            "dp_size": parallel_state.get_data_parallel_world_size(),
        }

    def _sampler(self) -> GlobalBatchSampler:
        return GlobalBatchSampler(self.order, consumed_samples=self.consumed_samples, **self._ranks())

    def train_dataloader(self) -> DataLoader:
        """This data-parallel rank's micro batches, from the first example not consumed yet."""
        items = self.train
        if self._padding_multiple is not None:
            items = PaddedToLongest(items, multiple_of=self._padding_multiple)
        return DataLoader(items, batch_sampler=self._sampler(), num_workers=0)

    def sample_ids_of_step(self, step: int) -> list[int]:
        """Ids of the examples that this data-parallel rank takes in a step (from 0 over the whole run), in order."""
        indices = self._sampler().of_step(step * self.global_batch_size)
        if isinstance(self.train, PackedDataset):
            return self.train.ids_of(indices).tolist()
        return self.train.sample_ids[indices].tolist()  # type: ignore[attr-defined]

    def validation_micro_batches(self) -> tuple[Iterator[dict[str, torch.Tensor]], int]:
        """This rank's validation micro batches in file order and the number of global batches; the last one is filled up with
        fully masked examples.
        """
        assert self.validation is not None
        sampler = SequentialBatchSampler(len(self.validation), **self._ranks())  # type: ignore[arg-type]
        return iter(
            DataLoader(self.validation, batch_sampler=sampler, num_workers=0)
        ), sampler.num_global_batches

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: the examples consumed so far."""
        assert self.trainer is not None
        return {"consumed_samples": self.trainer.global_step * self.global_batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues after the consumed examples."""
        self.consumed_samples = int(state_dict["consumed_samples"])
