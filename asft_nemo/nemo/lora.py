"""LoRA: NeMo's adapters on a frozen base, with an off switch that makes the policy its own reference.

NeMo's adapter of a linear layer W adds  alpha / rank * B (A x)  to  W x + b,  A [rank, in] drawn at random, B [out, rank] zero. Only A
and B are trained, reduced, optimized and written to checkpoints. `adapters_off` makes every adapted layer the base layer again.

Adapters are part of a chunk from its construction on, before DDP and the optimizer see it, so that every layout, virtual stages
included, is built, saved and resumed by the same code as full fine-tuning. (NeMo's own PEFT callback adds them at the first epoch, and
filters checkpoints by names that virtual stages nest away.)
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel as MegatronGPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from nemo.collections.llm.peft.lora import LoRA, LoRALinear
from torch import Tensor, nn

from asft_nemo.checkpoint.adapters import draw_a, seed_of
from asft_nemo.checkpoint.dist_read import check_before_load
from asft_nemo.errors import CheckpointError
from asft_nemo.nemo.compat import AnchoredStrategy, lora_without_transformer_engine

logger = logging.getLogger(__name__)

_ADAPTER = ".adapter."  # in the names of all adapter tensors and of no other


@dataclass(frozen=True)
class AdapterSpec:
    """The adapters of a model.

    Attributes:
        rank: rows of A and columns of B.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: probability of zeroing an entry of the adapter's input, in training.
        targets: linear layers of every transformer layer: linear_qkv, linear_proj, linear_fc1, linear_fc2. Query, key and value share
            one fused layer and so one A, gate and up projection another.
        seed: of the run; decides A.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    seed: int


class SwitchableLoRALinear(LoRALinear):
    """NeMo's adapted layer with an off switch.

    `enabled` False: the output is the base layer's own, bit for bit; the adapter is not run.
    """

    enabled = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the wrapped layer: (output, bias that the caller adds, or None)."""
        if self.enabled:
            with self._dropout_stream():
                return super().forward(x, *args, **kwargs)
        output, bias, _ = self.base_linear_forward(x, *args, **kwargs)
        return output, bias

    def _dropout_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Dropout masks differ between tensor-parallel ranks exactly where each rank holds another part of the adapter's input."""
        adapter: Any = self.adapter
        parted = adapter.input_is_parallel or not adapter.disable_sequence_parallel_comm
        if parted and self.training and adapter.dropout is not None:
            return get_cuda_rng_tracker().fork()  # pyright: ignore[reportOptionalMemberAccess]
        return contextlib.nullcontext()


def add_adapters(chunk: MegatronGPTModel, spec: AdapterSpec) -> None:
    """Freezes the chunk and puts an adapter on every target of its layers, before DDP or an optimizer sees it.

    A is drawn from (seed, layer, target) alone: the same at every layout. B is zero, so nothing changes before the first update.
    """
    lora_without_transformer_engine()
    chunk.requires_grad_(False)
    lora = LoRA(target_modules=list(spec.targets), dim=spec.rank, alpha=spec.alpha, dropout=spec.dropout)  # type: ignore[arg-type]
    layer: Any
    for layer in chunk.decoder.layers:
        for prefix, parent in list(layer.named_modules()):
            for name, child in list(parent.named_children()):
                adapted: Any = lora.transform(child, name=name, prefix=prefix)
                if adapted is not child:
                    setattr(parent, name, SwitchableLoRALinear(child, adapted.adapter))
                    whole = draw_a(
                        spec.rank,
                        adapted.adapter.linear_in.input_size,
                        seed=spec.seed,
                        layer=layer.layer_number - 1,
                        target=name,
                    )
                    _fill(adapted.adapter, whole)


def _fill(adapter: Any, whole: Tensor) -> None:
    """Fills this rank's part of A from the whole matrix."""
    weight, rank = adapter.linear_in.weight, parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        weight.copy_(whole.chunk(size, dim=weight.partition_dim)[rank])


def _adapted(chunks: Sequence[nn.Module]) -> list[SwitchableLoRALinear]:
    return [
        module for chunk in chunks for module in chunk.modules() if isinstance(module, SwitchableLoRALinear)
    ]


@contextlib.contextmanager
def adapters_off(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Within it every adapted layer of the chunks is its base layer."""
    layers = _adapted(chunks)
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def only_adapters(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds of the sharded state of a chunk with adapters, for the frozen base is where it came from."""
    return {key: value for key, value in state.items() if _ADAPTER in key}


def load_weights(chunks: Sequence[MegatronGPTModel], weights_dir: Path, *, adapters: bool) -> None:
    """Reads the frozen base weights, or the adapters, from a torch distributed checkpoint written at any layout.

    Collective over all ranks.
    """
    wanted = {}
    for index, chunk in enumerate(chunks):
        state = MegatronGPTModel.sharded_state_dict(chunk, prefix="module.")
        wanted[f"chunk_{index}"] = {
            key: value
            for key, value in state.items()
            if (_ADAPTER in key) == adapters and "_extra_state" not in key  # neither has any that is needed
        }
    check_before_load(weights_dir, torch.distributed.get_rank(), torch.distributed.get_world_size())
    loaded: Any = dist_checkpointing.load(wanted, str(weights_dir))
    for index, chunk in enumerate(chunks):
        _copy(loaded[f"chunk_{index}"], chunk, adapters=adapters)


def _copy(loaded: Mapping[str, Any], chunk: nn.Module, *, adapters: bool) -> None:
    """Copies loaded tensors into the chunk's base weights or adapters.

    Raises:
        RuntimeError: they are not exactly these.
    """
    own = {
        f"module.{name}": value
        for name, value in chunk.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and "_extra_state" not in name and (_ADAPTER in name) == adapters
    }
    tensors = {name for name in loaded if "_extra_state" not in name}  # empty, or Transformer Engine's
    if tensors != own.keys():
        raise RuntimeError(f"weights do not fit the model: {sorted(tensors ^ own.keys())} on one side only")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(loaded[name])


class AdapterStrategy(AnchoredStrategy):
    """The strategy of a run with adapters: a resumed checkpoint holds these and nothing of the base."""

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copies a checkpoint's adapters into the policy.

        Raises:
            CheckpointError: the checkpoint does not hold exactly the policy's adapters.
        """
        from asft_nemo.nemo.gpt_model import core_chunks

        assert self.megatron_parallel is not None
        chunks = core_chunks(self.megatron_parallel)
        # MegatronParallel numbers chunks where there are virtual stages
        nested = self.virtual_pipeline_model_parallel_size is not None
        for index, chunk in enumerate(chunks):
            state = checkpoint["state_dict"]
            try:
                _copy(state[f"model_{index}"] if nested else state, chunk, adapters=True)
            except RuntimeError as error:
                raise CheckpointError(f"the checkpoint's adapters are not this run's: {error}") from error


class LoraCallback(Callback):
    """Reads the base at the start of every fit, and what the adapters start from; makes each step's dropout a function of seed and step.

    So a resumed run draws the masks of a straight one, and nothing that runs beside the policy can move them.

    Args:
        base_dir: the base checkpoint in NeMo form.
        adapters_dir: a checkpoint of adapters to start from; None for fresh ones, and where the run's own will be read.
        seed: of the run.
    """

    def __init__(self, base_dir: Path, adapters_dir: Path | None, *, seed: int):
        self.base_dir = base_dir
        self.adapters_dir = adapters_dir
        self.seed = seed

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Before a checkpoint, which holds adapters only, is read."""
        from asft_nemo.nemo.gpt_model import core_chunks

        chunks = core_chunks(trainer.strategy.megatron_parallel)
        load_weights(chunks, self.base_dir / "weights", adapters=False)
        if self.adapters_dir is not None:
            load_weights(chunks, self.adapters_dir / "weights", adapters=True)
            for optimizer in trainer.strategy.optimizers:
                optimizer.reload_model_params()  # its fp32 copies were made before
        trained = sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad)
        logger.info(
            "LoRA: %d adapted layers, %d trained parameters on this rank", len(_adapted(chunks)), trained
        )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Seeds the default stream (the same on tensor-parallel ranks) and Megatron's own (another on each)."""
        data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        model_parallel_cuda_manual_seed(seed_of(self.seed, trainer.global_step, data_rank, stage))
