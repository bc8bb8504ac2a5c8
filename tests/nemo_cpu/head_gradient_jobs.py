"""What the ranks do for test_head_gradient.py. Every function is called on all ranks with JSON arguments."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from jobs import KeepGradients, fit, is_first_rank
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SMALL_BUCKET = 20_000  # parameters; the models of these tests have several times as many on a rank


class Allocations(TorchDispatchMode):
    """Names the operations that make a new tensor of one shape."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != self.shape:
                continue
            if tensor.untyped_storage().data_ptr() not in given:
                self.made.append(str(func))
        return out


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote is NaN: a dummy gradient that is read somewhere shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(8).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def small_buckets() -> Iterator[None]:
    """DDP with several buckets, so that some are reduced while backward still runs."""
    from asft_nemo.nemo import build

    config = functools.partial(build.DistributedDataParallelConfig, bucket_size=SMALL_BUCKET)
    with mock.patch.object(build, "DistributedDataParallelConfig", config):
        yield


def watcher(seen: dict[str, Any]) -> Any:
    """A callback that fills `seen` with what this rank's head gradient did.

    ``sinks``: for each forward pass of the head (gradients enabled, a sink was used, its scale). ``made``: operations of the second
    training step that made a tensor of the head's shape. ``main_grad_changed``: by forward-only steps. ``grads_left``: parameters whose
    `grad` is not None after a training step.
    """
    from lightning.pytorch import Callback

    from asft_nemo.nemo import head
    from asft_nemo.nemo.gpt_model import core_chunks
    from asft_nemo.nemo.head_gradient import into_main_grad

    class Watch(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.update(sinks=[], made=[], main_grad_changed=[], grads_left=0)
            parallel = trainer.strategy.megatron_parallel
            seen["bucket_groups"] = [len(chunk.module.bucket_groups) for chunk in parallel]
            last = core_chunks(parallel)[-1]
            self.weight: Any = last.head_weight() if last.post_process else None
            self.parameters = [p for chunk in parallel for p in chunk.parameters()]
            self.recorder: Any = None

            def watched(weight: Tensor, config: Any) -> Any:
                sink = into_main_grad(weight, config)
                seen["sinks"].append(
                    [torch.is_grad_enabled(), sink is not None, sink.upstream_scale if sink else None]
                )
                return sink

            self.patch = mock.patch.object(head, "into_main_grad", watched)
            self.patch.start()

        def on_megatron_microbatches_start(self, step: Any) -> None:
            if self.weight is None:
                return
            if step.forward_only:
                self.before = self.weight.main_grad.clone()
            elif step.step_i == 1:
                self.recorder = Allocations(tuple(self.weight.shape))
                self.recorder.__enter__()

        def on_megatron_microbatches_end(self, step: Any, microbatch_outputs: Any) -> None:
            if self.recorder is not None:
                self.recorder.__exit__(None, None, None)
                seen["made"], self.recorder = self.recorder.made, None
            if not step.forward_only:
                seen["grads_left"] += sum(p.grad is not None for p in self.parameters)
            elif self.weight is not None:
                seen["main_grad_changed"].append(not torch.equal(self.before, self.weight.main_grad))

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.patch.stop()

    return Watch()


def gradients(settings: dict[str, Any], *, valid: list[int], out: str) -> dict[str, Any]:
    """As `jobs.gradients`, with poisoned memory and small buckets; returns what the watcher saw on this rank."""
    settings = {**settings, "trainer.max_steps": 2, "trainer.checkpoint_every": 1, "trainer.keep": "last:2"}
    seen: dict[str, Any] = {}
    with poisoned_memory(), small_buckets():
        fit(settings, valid=valid, callbacks=(KeepGradients(Path(out), of_step=2), watcher(seen)))
    if is_first_rank():
        shutil.copytree(
            Path(settings["run.dir"]) / "base" / "context",
            Path(out) / "context",
            ignore=shutil.ignore_patterns("seal.json"),  # which is of the base's own weights
        )
    return seen


def train(settings: dict[str, Any], *, valid: list[int], validation: int = 0) -> dict[str, Any]:
    """Trains, with a validation set where asked; returns what the watcher saw on this rank."""
    seen: dict[str, Any] = {}
    with small_buckets():
        fit(settings, valid=valid, validation=validation, callbacks=(watcher(seen),))
    return seen


def low_precision_errors(settings: dict[str, Any], *, valid: list[int]) -> dict[str, float] | None:
    """One step; the error of the head's `main_grad`, and of the same gradient by way of autograd, both against fp64.

    The three are computed from the same hidden states and weights of the step. None on ranks without the head.
    """
    from lightning.pytorch import Callback

    from asft_nemo.losses import dense_loss, fused_linear_loss
    from asft_nemo.nemo import head
    from asft_nemo.nemo.gpt_model import core_chunks

    calls: list[dict[str, Any]] = []
    errors: dict[str, float] = {}

    def recorded(hidden_TH: Tensor, head_VH: Tensor, **others: Any) -> Any:
        calls.append({"hidden": hidden_TH.detach().clone(), **others})
        return fused_linear_loss(hidden_TH, head_VH, **others)

    class Compare(Callback):
        def on_megatron_step_end(self, step: Any) -> None:
            last = core_chunks(step.pipeline)[-1]
            if not last.post_process:
                return
            weight_VH: Any = last.head_weight()
            exact_VH = torch.zeros(weight_VH.shape, dtype=torch.float64)
            rounded_VH = torch.zeros(weight_VH.shape, dtype=torch.float32)
            tokens = 0
            for call in calls:
                rows = call["shard"].vocab_size
                inputs = {name: call[name] for name in ("labels_T", "loss_mask_T", "objective")}
                leaf = weight_VH.detach().double().requires_grad_()
                output = dense_loss(call["hidden"].double() @ leaf[:rows].T, **inputs)
                exact_VH += torch.autograd.grad(output.loss_sum, leaf)[0]
                tokens += int(output.num_tokens)
                leaf = weight_VH.detach().clone().requires_grad_()
                output = fused_linear_loss(call["hidden"], leaf, **inputs, shard=call["shard"])
                rounded_VH += torch.autograd.grad(output.loss_sum, leaf)[0]
            exact_VH /= tokens
            scale = exact_VH.abs().max()
            for name, found_VH in (("main_grad", weight_VH.main_grad), ("autograd", rounded_VH / tokens)):
                errors[name] = float((found_VH.double() - exact_VH).abs().max() / scale)

    with mock.patch.object(head, "fused_linear_loss", recorded):
        fit(settings, valid=valid, callbacks=(Compare(),))
    return errors or None


def decisions() -> dict[str, Any]:
    """What `into_main_grad` answers for weights and configurations of every kind, without a model."""
    from asft_nemo.nemo.head_gradient import into_main_grad

    def weight(main_grad: Any = torch.float32, frozen: bool = False, **attributes: Any) -> Any:
        made: Any = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16), requires_grad=not frozen)
        if main_grad is not None:
            made.main_grad = torch.zeros(4, 3, dtype=main_grad)
        for name, value in {"grad_added_to_main_grad": False, **attributes}.items():
            setattr(made, name, value)
        return made

    def config(**changes: Any) -> SimpleNamespace:
        usual = {
            "normalize_by": "tokens",
            "calculate_per_token_loss": True,
            "grad_scale_func": None,
            "no_sync_func": None,
        }
        return SimpleNamespace(**{**usual, **changes})

    def scale(**changes: Any) -> float | None:
        sink = into_main_grad(weight(), config(**changes))
        assert sink is not None
        return sink.upstream_scale

    def returned(made: Any, **changes: Any) -> list[Any]:
        sink = into_main_grad(made, config(**changes))
        assert sink is not None
        dummy = sink.returned()
        kind = None if dummy is None else [list(dummy.shape), str(dummy.dtype)]
        return [kind, made.grad_added_to_main_grad]

    with torch.no_grad():
        without_gradients = into_main_grad(weight(), config())
    no_sync = {"no_sync_func": contextlib.nullcontext}
    return {
        "used": into_main_grad(weight(), config()) is not None,
        "not_used": {
            "no_grad": without_gradients is None,
            "no_main_grad": into_main_grad(weight(None), config()) is None,
            "frozen": into_main_grad(weight(frozen=True), config()) is None,
            "bf16_main_grad": into_main_grad(weight(torch.bfloat16), config()) is None,
            "fsdp": into_main_grad(weight(__fsdp_param__=True), config()) is None,
        },
        "scale": scale(),
        "scale_unknown": {
            "micro_batch": scale(normalize_by="micro_batch"),
            "averaged_by_the_schedule": scale(calculate_per_token_loss=False),
            "fp16": scale(grad_scale_func=lambda loss: 1024 * loss),
        },
        "returned": {
            "plain": returned(weight()),
            "overlap": returned(weight(), **no_sync),
            "tied_on_one_stage": returned(weight(zero_out_wgrad=True)),
            "tied_on_one_stage_overlap": returned(weight(zero_out_wgrad=True), **no_sync),
        },
    }
