"""Tokenised examples as a dataset of fixed-length items."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from asft_nemo.config.schema import DataConfig
from asft_nemo.data.blocks import Block, load_blocks
from asft_nemo.data.loading import LoadReport, nothing_left, say
from asft_nemo.data.sources import refuse_bad_rows
from asft_nemo.data.tokenization import TextTokenizer
from asft_nemo.errors import DataError

log = logging.getLogger(__name__)

FILLER = -1  # index (and sample id) of an item without any learned token


class SupervisedDataset(Dataset[dict[str, Tensor]]):
    """Prompt-response examples as next-token items of `sequence_length` tokens, padded on the right.

    An item is a dict of `tokens`, `labels` (already shifted: the label of position i is token i + 1) and
    `position_ids`, int64 [S]; `loss_mask`, bool [S], True where the label counts; `sample_id`, int64
    scalar, the row's number among the non-blank lines of all files; and `domain_id`, int64 scalar, the place
    of its file among the files. Index -1 is a filler item: padding only, nothing learned, both ids -1.

    Args:
        blocks: the examples, in order.
        sequence_length, pad_id: of the items.
        report: what became of the rows.
    """

    def __init__(self, blocks: Sequence[Block], *, sequence_length: int, pad_id: int, report: LoadReport):
        self.sequence_length, self.pad_id, self.report = sequence_length, pad_id, report
        self._examples = [block.examples for block in blocks]
        sizes = [len(block.lengths) for block in blocks]
        self._ends = np.cumsum(sizes, dtype=np.int64)  # items up to and with each block
        self._lengths = np.concatenate([block.lengths for block in blocks])
        self._labels = np.concatenate([block.labels for block in blocks])
        self._sample_ids = np.concatenate([block.sample_ids for block in blocks])
        self._domain_ids = np.repeat(np.asarray([block.domain for block in blocks], dtype=np.int64), sizes)
        if max(self._lengths, default=0) > sequence_length + 1:
            raise ValueError(
                f"an example of {max(self._lengths)} tokens does not fit sequence_length={sequence_length}"
            )

    @classmethod
    def from_files(
        cls,
        files: Iterable[str | Path],
        data: DataConfig,
        *,
        tokenizer: TextTokenizer,
        vocab_size: int | None = None,
    ) -> SupervisedDataset:
        """Reads, renders and tokenises files, and says what was left out.

        Args:
            files: entries of `data.train`: files, patterns, directories, or what `asft data prepare` wrote.
            data: fields, template, sequence length and policies; its file lists are not looked at.
            tokenizer: of the model.
            vocab_size: the model's rows; a tokenizer with more ids is refused.

        Raises:
            DataError: a file cannot be read, rows are bad and `data.on_bad_row=fail` (or more than `data.max_bad_rows`), rows are too long and
                `data.on_too_long=fail`, or nothing is left.
        """
        if vocab_size is not None:
            tokenizer.refuse_smaller_model(vocab_size)
        report = LoadReport()
        blocks = load_blocks(files, data, tokenizer, report)
        refuse_bad_rows(report.bad, data)
        if not report.kept:
            raise DataError(nothing_left(report, data))
        say(report, data)
        return cls(blocks, sequence_length=data.sequence_length, pad_id=tokenizer.pad_id, report=report)

    def __len__(self) -> int:
        return len(self._sample_ids)

    @property
    def sample_ids(self) -> np.ndarray:
        """The id of every item, int64 [items]."""
        return self._sample_ids

    @property
    def domain_ids(self) -> np.ndarray:
        """The place of every item's file among the files, int64 [items]."""
        return self._domain_ids

    @property
    def lengths(self) -> np.ndarray:
        """Input tokens of every item, padding excluded, int64 [items]."""
        return self._lengths - 1

    def learned_tokens(self, sample_ids: Iterable[int]) -> int:
        """Labels that count in the examples of these ids, as far as they are here."""
        chosen = np.isin(self._sample_ids, np.fromiter(sample_ids, dtype=np.int64))
        return int(self._labels[chosen].sum())

    def numbered_from(self, first: int) -> SupervisedDataset:
        """The same items with ids that begin at `first`, so that two sets of a run share none."""
        other = copy.copy(self)
        other._sample_ids = self._sample_ids + first
        return other

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        size = self.sequence_length
        tokens = torch.full((size,), self.pad_id, dtype=torch.int64)
        labels = torch.full((size,), self.pad_id, dtype=torch.int64)
        loss_mask = torch.zeros(size, dtype=torch.bool)
        sample_id = domain_id = FILLER
        if index != FILLER:
            if not 0 <= index < len(self):
                raise IndexError(f"item {index} of {len(self)}")
            block = int(np.searchsorted(self._ends, index, side="right"))
            found, learned = self._examples[block][index - int(self._ends[block - 1]) if block else index]
            whole = torch.from_numpy(found.astype(np.int64))
            count = len(whole) - 1
            tokens[:count], labels[:count] = whole[:-1], whole[1:]
            # Label i is token i + 1, so the first learned label stands one place before the response.
            loss_mask[:count] = torch.from_numpy(learned[1:])
            sample_id, domain_id = int(self._sample_ids[index]), int(self._domain_ids[index])
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": torch.arange(size),
            "sample_id": torch.tensor(sample_id),
            "domain_id": torch.tensor(domain_id),
        }
