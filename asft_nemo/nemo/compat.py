"""Work-arounds for NeMo and Megatron-core, each with its reason and version; nothing here changes what is computed.

Written for NeMo 2.7.3 with Megatron-core 0.15.3. NeMo 2.6.2 with 0.15.3 needs nothing else; what NeMo 2.7.3 with 0.16.1 needs says so.
`make test-compat` trains with all three.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from nemo.lightning import MegatronStrategy
from nemo.lightning._strategy_lib import init_model_parallel
from nemo.lightning.pytorch.strategies import megatron_strategy
from torch.distributed import distributed_c10d
from torch.distributed.constants import default_pg_timeout

from asft_nemo.nemo.extra_state import ExtraStateTolerant, fill_extra_states


def lora_without_transformer_engine() -> None:
    """Lets `nemo.collections.llm.peft` adapt Megatron's own layers where Transformer Engine is not installed (nemo 2.7.3).

    * `lora.te` is a placeholder that raises on `te.Linear`, which `LoRA.transform` compares classes with: a class that matches nothing.
    * `utils.HAVE_TE` is True, for megatron exports None under the names it asks for, and isinstance(layer, None) raises: False.

    Raises:
        RuntimeError: upstream has moved.
    """
    import importlib.util
    from types import SimpleNamespace

    from nemo.collections.llm.peft import lora, utils

    if importlib.util.find_spec("transformer_engine") is not None:
        return
    for module, name in ((lora, "te"), (utils, "HAVE_TE"), (utils, "get_adapter_attributes_from_linear")):
        if not hasattr(module, name):
            raise RuntimeError(
                f"{module.__name__}.{name} (nemo 2.7.3) is not there any more: look at asft_nemo/nemo/compat.py"
            )
    lora.te = SimpleNamespace(Linear=type("NoTransformerEngineLinear", (), {}))
    utils.HAVE_TE = False


_NEMO_TIMEOUT = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"
_ADAM = ("lr", "betas", "eps", "weight_decay")  # what every Adam's parameter groups have


class AnchoredStrategy(MegatronStrategy):
    """NeMo's strategy, usable for several fits in one process.

    * `setup_distributed` returns early when torch.distributed is up already and then leaves the previous run's model-parallel groups
      in place (nemo 2.7.3): they are ended and the groups of this run are made here. Megatron's own clean-up forgets its groups and
      ends none of them (megatron-core 0.15.3): their threads and connections would add up from run to run.
    * The group of all ranks gets NCCL's 10 minutes (nemo 2.7.3 says nothing, Megatron gives its own groups 30): a rank that writes the rest of
      a checkpoint may take longer, and a rank that hangs would end the others by an abort before they have named it. It gets torch's 30,
      unless TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC is set, which NeMo takes for it.
    * Megatron's number-of-micro-batches calculator refuses a second run with other batch sizes: it is cleared.
    * `timers` (nemo's ProgressPrinter all-gathers them on rank 0 only and deadlocks): none.
    * Megatron's distributed optimizer over torch's Adam, where no fused one is installed, cannot load its checkpoints (megatron-core
      0.15.3). It asserts that there is state already: there is, before a checkpoint is read. It misses torch's `step` among what it
      copies: it is given its own. It lets all parameters share one `step`, which each of them would count up: each gets a copy.
      The same holds over its hybrid optimizer (`optim.cpu_offload`), whose state a step over random gradients makes; the parameters
      that this moves are read from the checkpoint afterwards.
    * Checkpoints load into Transformer Engine's layers and into Megatron's own, whichever wrote them, and run no pickle: see `extra_state.py`.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.timers = None
        self.checkpoint_io = ExtraStateTolerant(self.checkpoint_io, self._goes_on_with_scales)

    def _goes_on_with_scales(self) -> bool:
        """Whether this run goes on from its own checkpoint (NeMo then restores no other) and its FP8 scales come from earlier passes."""
        config: Any = self.lightning_module.config  # type: ignore[union-attr]
        return self.restore_config is None and bool(config.fp8) and config.fp8_recipe == "delayed"

    def setup_distributed(self) -> None:
        """Starts or re-uses torch.distributed and makes this run's model-parallel groups."""
        from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

        again = torch.distributed.is_initialized()
        if again:
            end_groups()
        destroy_num_microbatches_calculator()
        super().setup_distributed()
        if torch.distributed.get_backend() == "nccl" and _NEMO_TIMEOUT not in os.environ:
            distributed_c10d._set_pg_timeout(default_pg_timeout)  # pyright: ignore[reportPrivateUsage]
        if again:
            init_model_parallel(self.model)

    def setup_optimizers(self, trainer: Any) -> None:
        """NeMo's, understood by Megatron-core 0.16 too."""
        with _optimizer_as_nemo_asks():
            super().setup_optimizers(trainer)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """NeMo's."""
        assert self.megatron_parallel is not None
        loaded = checkpoint.get("state_dict", checkpoint)
        for index, chunk in enumerate(self.megatron_parallel):
            # NeMo numbers chunks where there are virtual stages
            fill_extra_states(chunk, loaded.get(f"model_{index}", loaded))
        super().load_model_state_dict(checkpoint, strict=strict)

    def optimizer_sharded_state_dict(
        self, is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> Any:
        """NeMo's. Collectives: those of Megatron's distributed optimizer."""
        for part in _over_hybrid_adam(self.optimizers):
            make_groups_portable(part.optimizer)
        if is_loading:
            for part in _over_hybrid_adam(self.optimizers):
                if not part.optimizer.state:
                    part.optimizer.dummy_step()
            for part in _over_torch_adam(self.optimizers):
                for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
                    if not part.optimizer.state[parameter]:
                        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                        part.optimizer.state[parameter] = {"step": torch.zeros((), device="cpu"), **moments}
        return super().optimizer_sharded_state_dict(is_loading=is_loading, metadata=metadata)

    def load_optimizer_state_dict(
        self, checkpoint: Mapping[str, Any], selective_restore: bool = False
    ) -> None:
        """NeMo's."""
        parts = list(_over_torch_adam(self.optimizers))
        for part in parts:
            part._set_main_param_and_optimizer_states = functools.partial(_set_states, part)
        hybrids = [part.optimizer for part in _over_hybrid_adam(self.optimizers)]
        try:
            with _state_where_it_is() if hybrids else contextlib.nullcontext():
                super().load_optimizer_state_dict(checkpoint, selective_restore=selective_restore)
            _beside_their_parameters(hybrids)
        finally:
            for part in parts:
                del part._set_main_param_and_optimizer_states  # the class's own is seen again
        for part in (*parts, *_over_hybrid_adam(self.optimizers)):
            for state in part.optimizer.state.values():
                if "step" in state:  # Transformer Engine's and apex's Adam count once a group
                    state["step"] = state["step"].clone()


@contextlib.contextmanager
def _state_where_it_is() -> Iterator[None]:
    """Keeps NeMo from moving a loaded optimizer's whole state to the device (`load_optimizer_state_dict`, nemo 2.7.3).

    The hybrid optimizer's part of the CPU has these very dicts: the share in host memory would fill the device, and the next step would
    find parameters and moments apart.
    """
    with mock.patch.object(megatron_strategy, "_optimizer_to_device", return_value=None):
        yield


def _beside_their_parameters(hybrids: Iterable[HybridDeviceOptimizer]) -> None:
    """Moves loaded moments to where their parameters are.

    `_move_new_state_to_right_device` (megatron-core 0.15.3) does so where the device has an Adam of its own; where both parts have torch's,
    it takes both for the CPU's.
    """
    for hybrid in hybrids:
        for part in hybrid.sub_optimizers:
            for parameter, state in part.state.items():
                moved = {
                    k: v.to(parameter.device) for k, v in state.items() if k != "step" and torch.is_tensor(v)
                }
                state.update(moved)


@contextlib.contextmanager
def _optimizer_as_nemo_asks() -> Iterator[None]:
    """Lets NeMo 2.7.3 make Megatron-core 0.16's optimizers, which take `config_overrides` in place of three arguments that NeMo passes.

    The three say at their defaults what `config_overrides=None` means: no weight decay for biases and vectors, one learning rate.

    Raises:
        RuntimeError: one of them is not at its default.
    """
    import megatron.core.optimizer as optimizers

    make = optimizers.get_megatron_optimizer
    gone = {"no_weight_decay_cond": None, "scale_lr_cond": None, "lr_mult": 1.0}
    if set(gone) <= set(inspect.signature(make).parameters):
        yield
        return

    def as_nemo_asks(*args: Any, **kwargs: Any) -> Any:
        for name, default in gone.items():
            if kwargs.pop(name, default) != default:
                raise RuntimeError(f"this megatron-core has no {name}: look at asft_nemo/nemo/compat.py")
        return make(*args, **kwargs)

    optimizers.get_megatron_optimizer = as_nemo_asks
    try:
        yield
    finally:
        optimizers.get_megatron_optimizer = make


def _set_states(part: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    """Megatron's method of this name with the `step` that is there."""
    step = part._get_main_param_and_optimizer_states(model_param)["step"]
    DistributedOptimizer._set_main_param_and_optimizer_states(part, model_param, {"step": step, **tensors})


def _over_torch_adam(optimizers: Iterable[Any]) -> Iterator[Any]:
    """Megatron's distributed optimizers whose inner one is torch's own Adam."""
    for name in ("_set_main_param_and_optimizer_states", "_get_main_param_and_optimizer_states"):
        if not hasattr(DistributedOptimizer, name):
            raise RuntimeError(
                f"DistributedOptimizer.{name} (megatron-core 0.15.3) is not there any more: look at asft_nemo/nemo/compat.py"
            )
    for part in _distributed(optimizers):
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            yield part


def _over_hybrid_adam(optimizers: Iterable[Any]) -> Iterator[Any]:
    """Megatron's distributed optimizers whose inner one keeps a share of its state in host memory."""
    for part in _distributed(optimizers):
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            yield part


def make_groups_portable(hybrid: HybridDeviceOptimizer) -> None:
    """Keeps what only the hybrid optimizer knows out of its state dict, and gives it back when one is loaded.

    Its parameter groups name classes (`cpu_optimizer_cls`), which torch 2.6 and newer refuse to read from a checkpoint, and its share,
    which another run need not have (megatron-core 0.15.3). So checkpoints are those of the ordinary Adam.
    """
    if "state_dict" in vars(hybrid):
        return
    own = {key: value for key, value in hybrid.defaults.items() if key not in _ADAM}
    give, take = hybrid.state_dict, hybrid.load_state_dict

    def state_dict() -> dict[str, Any]:
        state = give()
        groups = [{k: v for k, v in group.items() if k not in own} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def load_state_dict(state: dict[str, Any]) -> None:
        take({**state, "param_groups": [{**group, **own} for group in state["param_groups"]]})

    hybrid.state_dict, hybrid.load_state_dict = state_dict, load_state_dict  # type: ignore[method-assign]


def _distributed(optimizers: Iterable[Any]) -> Iterator[Any]:
    for wrapper in optimizers:
        whole = wrapper.mcore_optimizer
        for part in getattr(whole, "chained_optimizers", [whole]):
            if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer:
                yield part


def end_groups() -> None:
    """Ends all process groups but the one of all ranks. Collective over all ranks: nobody may be waiting in one of them."""
    from megatron.core import parallel_state

    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)


def before_grad_sync(chunk: Any, see: Callable[[torch.Tensor], None]) -> None:
    """Calls `see` with each bucket's gradient, summed over this rank's micro batches, just before its data-parallel reduction.

    `_ParamAndGradBucketGroup.start_grad_sync` (megatron-core 0.15.3, 0.16.1) has one place to look at a gradient before other ranks' are added:
    `check_for_nan_in_grad`. It waits for the device at every bucket and raises on one rank alone, in the middle of the schedule, while
    the others wait in the reduction until they are killed. `see` runs in its place, with the overlapped reduction and without.

    Args:
        chunk: a chunk of MegatronParallel.
        see: gets a bucket's gradient, flat, in the dtype of the reduction; must not change it.

    Raises:
        RuntimeError: Megatron's classes are not those this was written for.
    """
    wrapper = _data_parallel(chunk)
    for group in (*wrapper.bucket_groups, *wrapper.expert_parallel_bucket_groups):
        start = getattr(group, "start_grad_sync", None)
        if start is None or not all(hasattr(bucket, "grad_data") for bucket in group.buckets):
            raise RuntimeError(
                f"{type(group).__name__} of this megatron-core has no start_grad_sync or grad_data"
            )

        def watched(*args: Any, group: Any = group, start: Any = start, **kwargs: Any) -> None:
            # megatron-core 0.16 asks twice for the reduction of a run's first batch; by the second time it is on its way
            if not (getattr(group, "is_first_batch", False) and group.grad_reduce_handle is not None):
                for bucket in group.buckets:
                    see(bucket.grad_data)
            start(*args, **kwargs)

        group.start_grad_sync = watched


def grad_buffers(chunk: Any) -> list[torch.Tensor]:
    """The flat gradient buffers of a chunk; with the distributed optimizer, other ranks' parts of them are this rank's own sums."""
    wrapper = _data_parallel(chunk)
    return [buffer.grad_data for buffer in (*wrapper.buffers, *wrapper.expert_parallel_buffers)]


def _data_parallel(chunk: Any) -> Any:
    """Megatron's data-parallel wrapper inside a chunk of MegatronParallel."""
    while not (hasattr(chunk, "bucket_groups") and hasattr(chunk, "expert_parallel_buffers")):
        if "module" not in getattr(chunk, "_modules", {}):
            raise RuntimeError(
                "no DistributedDataParallel of megatron-core 0.15 in this model: its gradients cannot be watched"
            )
        chunk = chunk.module
    return chunk


def make_skippable(optimizer: Any, skip: Callable[[], bool]) -> None:
    """Lets `skip` turn an optimizer step into nothing: neither parameters nor state change.

    NeMo's `McoreDistributedOptimizer.step` (nemo 2.7.3) runs forward and backward and then `mcore_optimizer.step()` in one call, so no
    hook of Lightning's lies between; what a step without an update returns is Megatron's own answer after an overflow.

    Raises:
        RuntimeError: the optimizer is not NeMo's wrapper around Megatron's.
    """
    inner = getattr(optimizer, "mcore_optimizer", None)
    if inner is None or not hasattr(inner, "step_with_ready_grads"):
        raise RuntimeError(
            f"{type(optimizer).__name__} is not NeMo's wrapper around a Megatron optimizer: its steps cannot be skipped"
        )
    take = inner.step
    inner.step = lambda: (False, None, None) if skip() else take()
