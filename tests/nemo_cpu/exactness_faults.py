"""Mistakes that a layout invites, made on purpose on all ranks: a matrix that passes with one of them would show nothing."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from exactness_factors import Case, committed_cases


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Attributes:
        levels: of a case that must show it.
        symbol: ``module:attribute`` that is replaced.
        wrong: makes the replacement from what is there.
    """

    levels: Case
    symbol: str
    wrong: Callable[[Any], Any]

    def case(self) -> Case:
        """The first case of the matrix with these levels."""
        return next(case for case in committed_cases() if self.levels.items() <= case.items())

    def made(self) -> contextlib.AbstractContextManager[Any]:
        """Within it this process makes the mistake."""
        module, _, path = self.symbol.partition(":")
        *owners, name = path.split(".")
        holder: Any = importlib.import_module(module)
        for owner in owners:
            holder = getattr(holder, owner)
        return mock.patch.object(holder, name, self.wrong(getattr(holder, name)))


def _not_marked(init: Any) -> Any:
    def wrong(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    return wrong


def _not_summed(_: Any) -> Any:
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    return lambda part, group: gather_from_sequence_parallel_region(
        part.contiguous(), tensor_parallel_output_grad=False, group=group
    )


def _causal_alone(_: Any) -> Any:
    return lambda segment_ids_BS: torch.ones(
        segment_ids_BS.shape[1], segment_ids_BS.shape[1], dtype=torch.bool
    ).triu(1)[None, None]


def _every_step(_: Any) -> Any:
    from asft_nemo.nemo.gpt_model import core_chunks

    return lambda self, snapshot, step: snapshot.refresh(core_chunks(step.pipeline))


FAULTS: dict[str, Fault] = {
    "norms of sequence-parallel ranks keep their own gradients": Fault(
        {"sp": "on", "adapters": "none"}, "asft_nemo.cpu.norm:RMSNorm.__init__", _not_marked
    ),
    "gradients of gathered keys and values are not summed over context-parallel ranks": Fault(
        {"cp": "2", "adapters": "none"}, "asft_nemo.nemo.context_parallel:_gathered", _not_summed
    ),
    "packed examples see each other": Fault(
        {"rows": "packed", "cp": "1"}, "asft_nemo.nemo.packed_attention:hidden_pairs", _causal_alone
    ),
    "adapters stay on in the reference's pass": Fault(
        {"reference": "adapter_disabled", "kl": "forward"},
        "asft_nemo.nemo.references:adapters_off",
        lambda _: lambda chunks: contextlib.nullcontext(),
    ),
    "a snapshot is taken at every step": Fault(
        {"objective": "psft"}, "asft_nemo.nemo.schedule:PrepassCallback._refresh_when_due", _every_step
    ),
    "tied embeddings of two stages keep their own gradients": Fault(
        {"embeddings": "tied", "adapters": "none", "pp": "4"},
        "megatron.core.distributed.finalize_model_grads:_allreduce_word_embedding_grads",
        lambda _: lambda *args, **kwargs: None,
    ),
    "context-parallel ranks divide by their own tokens of a micro batch": Fault(
        {"mean": "of micro batches", "cp": "2"},
        "asft_nemo.nemo.loss_reduction:_tokens_of_micro_batch",
        lambda _: lambda num_tokens: num_tokens,
    ),
    "the head's gradient that nobody wrote is added": Fault(
        {"reduction": "overlapped", "loss": "fused, 7 tokens", "adapters": "none", "embeddings": "untied"},
        "asft_nemo.nemo.head_gradient:_returned",
        lambda _: lambda weight, config: torch.ones_like(weight),
    ),
}
