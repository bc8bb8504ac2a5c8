"""Stops the run, or skips the step, when hidden states, the loss or a gradient is not finite.

What is looked at, on the device, as the step goes by:

* after every chunk's transformer block: the hidden states, of all tokens (where something began) and, behind the last stage, of the
  tokens that count (whether it matters): one minimum and maximum over each;
* every micro batch's loss;
* every gradient buffer twice: this rank's own sum before it is reduced over data-parallel ranks (who made it), and the finished
  gradient (what the optimizer would take): one norm each.

Nothing is read back before the step's end. Then one all-reduce of one value decides for all ranks at once, before the optimizer; only
when something was wrong do the ranks exchange what they saw. Hidden states that are not finite at tokens without a loss decide nothing:
if they reach anything, it is another token's hidden state or a gradient.
"""

from __future__ import annotations

import enum
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback
from megatron.core import parallel_state
from torch import Tensor

from asft_nemo.errors import UserError
from asft_nemo.losses import LossOutput
from asft_nemo.nemo.alarms import Alarms
from asft_nemo.nemo.compat import before_grad_sync, grad_buffers, make_skippable
from asft_nemo.nemo.gpt_model import AnchoredGPTModel, core_chunks

logger = logging.getLogger(__name__)

MOST_LISTED = 8  # ranks or rows in one sentence


class Seen(enum.Enum):
    """What was not finite."""

    ANY_HIDDEN = "hidden states of any token, behind some chunk"
    HIDDEN = "final hidden states of tokens that count"
    REFERENCE = "the reference's hidden states or log probabilities of tokens that count"
    SNAPSHOT = "the policy snapshot's log probabilities of tokens that count"
    LOSS = "the loss"
    OWN_GRADIENT = "this rank's gradient before the reduction over data-parallel ranks"
    GRADIENT = "the finished gradient"


DECIDES = (Seen.HIDDEN, Seen.LOSS, Seen.OWN_GRADIENT, Seen.GRADIENT)


class Place(NamedTuple):
    """Where in a step: the micro batch, counted from 0, and the virtual stage; both 0 for gradients."""

    micro_batch: int = 0
    virtual_stage: int = 0


@dataclass(frozen=True)
class RankReport:
    """What one rank saw in a step that went wrong.

    Attributes:
        rank, dp_rank, pp_rank, tp_rank: global and within the groups.
        seen: what was not finite, and where.
        rows: numbers of the data rows in each micro batch of this rank.
    """

    rank: int
    dp_rank: int
    pp_rank: int
    tp_rank: int
    seen: frozenset[tuple[Seen, Place]]
    rows: dict[int, tuple[int, ...]]

    def places(self, *kinds: Seen) -> Iterator[Place]:
        """Where this rank saw any of `kinds`."""
        return (place for kind, place in self.seen if kind in kinds)


def explain(reports: Sequence[RankReport], *, num_micro_batches: int) -> str:
    """What was not finite, and where it was seen first: the micro batch, then the pipeline stage, then the lowest rank.

    Args:
        reports: of all ranks.
        num_micro_batches: of one data-parallel rank and step.
    """
    harmful = [
        (place.micro_batch, report.dp_rank)
        for report in reports
        for place in report.places(Seen.HIDDEN, Seen.LOSS)
    ]
    if not harmful:
        return _explain_gradient(reports)
    micro_batch, dp_rank = min(harmful)
    here = [report for report in reports if report.dp_rank == dp_rank]
    kinds = {kind for report in here for kind, place in report.seen if place.micro_batch == micro_batch}
    if Seen.HIDDEN in kinds:
        what, where = "hidden states are not finite", Seen.ANY_HIDDEN
    elif Seen.REFERENCE in kinds:
        what, where = "the reference's hidden states are not finite (the policy's are)", Seen.REFERENCE
    elif Seen.SNAPSHOT in kinds:
        what, where = (
            "the policy snapshot's log probabilities are not finite (the hidden states are)",
            Seen.SNAPSHOT,
        )
    else:
        what, where = "the loss is not finite (the hidden states are)", Seen.LOSS
    first = _first(here, where, micro_batch)
    rows = first.rows.get(micro_batch, ())
    learned = f"; rows {_listed(rows)} of the data files" if rows else ""
    return (
        f"{what}, first seen in micro batch {micro_batch + 1} of {num_micro_batches} on global rank {first.rank} "
        f"(data-parallel rank {dp_rank}, pipeline rank {first.pp_rank}, tensor-parallel rank {first.tp_rank}{learned})"
    )


def _first(reports: Sequence[RankReport], kind: Seen, micro_batch: int) -> RankReport:
    """The report of the earliest stage, then lowest rank, that saw `kind` in this micro batch."""
    found = [
        (place.virtual_stage, report.pp_rank, report.rank, report)
        for report in reports
        for place in report.places(kind)
        if place.micro_batch == micro_batch
    ]
    return min(found, key=lambda item: item[:3])[3]


def _explain_gradient(reports: Sequence[RankReport]) -> str:
    own = [report for report in reports if any(report.places(Seen.OWN_GRADIENT))]
    at = own or [report for report in reports if any(report.places(Seen.GRADIENT))]
    how = "" if own else ", after the reduction only,"
    text = (
        f"a gradient is not finite (loss and hidden states are){how} on global rank {_listed([report.rank for report in at])} "
        f"(data-parallel rank {_listed(sorted({report.dp_rank for report in at}))})"
    )
    unlearned = [
        (place.micro_batch, place.virtual_stage, report.pp_rank, report.rank)
        for report in reports
        for place in report.places(Seen.ANY_HIDDEN)
    ]
    if unlearned:
        micro_batch, _, _, rank = min(unlearned)
        text += f"; hidden states of tokens without a loss were not finite in micro batch {micro_batch + 1} on global rank {rank}"
    return text


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:MOST_LISTED])
    return shown if len(numbers) <= MOST_LISTED else f"{shown} and {len(numbers) - MOST_LISTED} more"


def not_finite_rows(values: Tensor) -> Tensor:
    """Which rows [...] of `values` [..., H] hold a NaN or an infinity; bool, no temporary of the size of `values`."""
    low, high = torch.aminmax(values.detach(), dim=-1)
    return ~(torch.isfinite(low) & torch.isfinite(high))


class NonfiniteGuard(Callback):
    """Looks for values that are not finite and decides, on all ranks alike, before the optimizer step.

    With ``skip`` a bad step leaves parameters and optimizer state as they are; the step still counts, the learning rate and the data
    go on. The number of skipped steps is part of every checkpoint.

    Collectives: one all-reduce of one value a step over the world; an all-gather of small objects where something was wrong.

    Args:
        on_nonfinite: ``stop`` or ``skip``.
        max_skips: steps of the whole run that ``skip`` may skip.
        alarms: where what was found goes, too.

    Attributes:
        skipped: the current step is not taken by the optimizer.
        skipped_steps: of the whole run so far.
    """

    def __init__(self, *, on_nonfinite: str, max_skips: int, alarms: Alarms):
        self.on_nonfinite, self.max_skips, self.alarms = on_nonfinite, max_skips, alarms
        self.skipped = False
        self.skipped_steps = 0
        self._flags: list[tuple[Seen, Place, Tensor]] = []
        self._rows: dict[int, Any] = {}
        self._batch: dict[str, Any] | None = None
        self._hooks: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints; the same on all ranks."""
        return {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting after a resume."""
        self.skipped_steps = int(state_dict["skipped_steps"])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Hooks into the policy's chunks, their gradient buffers and, to skip, the optimizer."""
        parallel = trainer.strategy.megatron_parallel
        for stage, chunk in enumerate(core_chunks(parallel)):
            see = functools.partial(self._see_hidden, chunk, stage)
            self._hooks.append(chunk.decoder.register_forward_hook(see))
        for chunk in parallel:
            before_grad_sync(chunk, functools.partial(self._see_gradient, Seen.OWN_GRADIENT))
        if self.on_nonfinite == "skip":
            for optimizer in trainer.optimizers:
                make_skippable(optimizer, lambda: self.skipped)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Takes the hooks off again."""
        while self._hooks:
            self._hooks.pop().remove()

    def on_megatron_microbatches_start(self, step: Any) -> None:
        """A training step begins."""
        if not step.forward_only:
            self.skipped = False
            self._flags.clear()
            self._rows.clear()

    def on_megatron_microbatch_start(self, step: Any, batch: dict[str, Any]) -> None:
        """From here to its end, what the policy's chunks compute belongs to this micro batch."""
        if not step.forward_only:
            self._batch = batch
            self._rows[batch["micro_batch_index"]] = batch.get("sample_id")

    def on_megatron_microbatch_end(self, step: Any, batch: dict[str, Any], output: Any) -> None:
        """Looks at the loss, where this chunk computed it."""
        if self._batch is not None and isinstance(output, LossOutput):
            bad = ~torch.isfinite(output.loss_sum.detach())
            self._flags.append((Seen.LOSS, Place(batch["micro_batch_index"]), bad))
        self._batch = None

    @torch.no_grad()
    def _see_hidden(
        self, chunk: AnchoredGPTModel, stage: int, module: Any, inputs: Any, hidden_SBH: Tensor
    ) -> None:
        """Forward hook of a chunk's transformer block; `hidden_SBH` are this rank's rows under sequence parallelism."""
        if self._batch is None:  # validation, or a prepass through the same weights
            return
        place = Place(self._batch["micro_batch_index"], stage)
        bad_SB = not_finite_rows(hidden_SBH)
        self._flags.append((Seen.ANY_HIDDEN, place, bad_SB.any()))
        if not chunk.post_process:
            return
        mask_SB = self._batch["loss_mask"].transpose(0, 1)
        own_SB = mask_SB
        if chunk.config.sequence_parallel:
            tp_size = parallel_state.get_tensor_model_parallel_world_size()
            own_SB = mask_SB.chunk(tp_size)[parallel_state.get_tensor_model_parallel_rank()]
        self._flags.append((Seen.HIDDEN, place, (bad_SB & own_SB).any()))
        if (reference_SBH := self._batch.get("ref_hidden")) is not None:
            self._flags.append((Seen.REFERENCE, place, (not_finite_rows(reference_SBH) & own_SB).any()))
        for name, kind in (("ref_logprob", Seen.REFERENCE), ("old_logprob", Seen.SNAPSHOT)):
            if (logprob_BS := self._batch.get(name)) is not None:
                bad_SB = ~torch.isfinite(logprob_BS).transpose(0, 1)
                self._flags.append((kind, place, (bad_SB & mask_SB).any()))

    @torch.no_grad()
    def _see_gradient(self, kind: Seen, buffer: Tensor) -> None:
        # the norm, as Megatron's clipping takes it: it also shows finite gradients whose norm is beyond fp32
        self._flags.append((kind, Place(), ~torch.isfinite(torch.linalg.vector_norm(buffer))))

    def on_megatron_step_end(self, step: Any) -> None:
        """After forward, backward and the reduction of gradients, before the optimizer: decides.

        Raises:
            UserError: on every rank, when the run must not go on.
        """
        if step.forward_only:
            return
        for chunk in step.pipeline:
            for buffer in grad_buffers(chunk):
                self._see_gradient(Seen.GRADIENT, buffer)
        device = torch.cuda.current_device()
        deciding = [flag for kind, _, flag in self._flags if kind in DECIDES]
        bad = torch.stack(deciding).any() if deciding else torch.tensor(False, device=device)
        bad = bad.to(torch.float32)
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        if bad.item():
            self._react(step)

    def _react(self, step: Any) -> None:
        """Stops, or marks the step as skipped. The same on all ranks."""
        reports: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(reports, self._report())
        found = explain(reports, num_micro_batches=step.num_microbatches)
        what = f"step {step.step_i + 1}: {found}; the optimizer step was not taken"
        self.alarms.sound("nonfinite", step.step_i + 1, found, said=True)
        if self.on_nonfinite == "stop":
            raise UserError(
                f"{what}: lower optim.lr or check the data, or set trainer.on_nonfinite=skip to go on without such steps"
            )
        if self.skipped_steps >= self.max_skips:
            raise UserError(
                f"{what}, and {self.skipped_steps} of this run were skipped before: lower optim.lr or check the data, or resume with "
                f"trainer.max_skips above {self.max_skips}"
            )
        self.skipped = True
        self.skipped_steps += 1
        logger.warning("%s (skipped step %d of at most %d)", what, self.skipped_steps, self.max_skips)
        for chunk in step.pipeline:
            chunk.zero_grad_buffer()

    def _report(self) -> RankReport:
        values = torch.stack([flag for _, _, flag in self._flags]).tolist() if self._flags else []
        seen = zip(self._flags, values, strict=True)
        return RankReport(
            rank=torch.distributed.get_rank(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            seen=frozenset((kind, place) for (kind, place, _), bad in seen if bad),
            rows={
                index: tuple(row for row in ids.flatten().tolist() if row >= 0)
                for index, ids in self._rows.items()
                if isinstance(ids, Tensor)
            },
        )
