"""This process as one rank of a world whose other ranks do not exist, and a run's settings as they are on a GPU."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides
from nemo.utils import AppState
from torch.testing._internal.distributed.fake_pg import FakeStore

from asft_nemo.config.schema import RunConfig, replace
from asft_nemo.cpu import backend
from asft_nemo.errors import LayoutError
from asft_nemo.losses.chunks import resolve_chunk_tokens
from asft_nemo.model import ModelSpec
from asft_nemo.nemo import build
from asft_nemo.nemo.gpt_model import AnchoredGPTConfig
from asft_nemo.nemo.precision import precision_plugin
from asft_nemo.nemo.simulate import stand_ins

# Kernels that need a GPU or another package to be imported. None of them changes what is kept for backward but the fused softmax of
# Megatron's own attention, which keeps the probabilities in the compute dtype alone.
_NOT_HERE: dict[str, Any] = {
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "tp_comm_overlap": False,
    "apply_rope_fusion": False,
}


@contextlib.contextmanager
def first_rank_of_stage(run: RunConfig, stage: int) -> Iterator[int]:
    """The first rank of a pipeline stage under torch's fake process group; gives the rank.

    What is gathered as Python objects (the optimizers' parameter groups) is this rank's own everywhere.
    """
    layout, world = run.parallel, run.run.world_size
    rank = stage * (
        world // layout.pp_size
    )  # pipeline stages are the outermost of Megatron's order, tp-cp-ep-dp-pp
    torch.distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    AppState().use_gloo_process_groups = (
        False  # Megatron's optimizers want one of gloo beside each group otherwise
    )
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp_size,
            pipeline_model_parallel_size=layout.pp_size,
            virtual_pipeline_model_parallel_size=layout.vpp_size,
            context_parallel_size=layout.cp_size,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(run.run.seed)
        with mock.patch.object(torch.distributed, "all_gather_object", _everybody_is_this_rank):
            yield rank
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _everybody_is_this_rank(objects: list[Any], own: Any, group: Any = None) -> None:
    objects[:] = [own] * len(objects)


def config_on_gpu(run: RunConfig, spec: ModelSpec, *, kernels: str) -> AnchoredGPTConfig:
    """The policy's config as it is on GPUs, but for kernels that only exist there. Megatron checks the settings while it is made.

    Args:
        run: settings, in a precision that does without Transformer Engine.
        spec: architecture.
        kernels: ``te`` for the stand-ins of Transformer Engine's layers, ``local`` for Megatron's own.

    Raises:
        LayoutError: Megatron refuses the settings, in its words.
    """
    asked = replace(run, {"kernels.gradient_accumulation_fusion": False})
    with mock.patch.object(backend, "active", return_value=False):
        try:
            config = build.model_config(asked, spec)
        except (AssertionError, ValueError) as error:
            raise LayoutError(_in_one_sentence(run, error)) from error
    for name, value in _NOT_HERE.items():
        setattr(config, name, value)
    if kernels == "te":
        config.transformer_layer_spec = stand_ins.layer_spec
        config.apply_rope_fusion = run.kernels.fusions
    config.loss_chunk_tokens = _chunk_tokens(run, config)
    plugin = precision_plugin(run.precision)
    return config if plugin is None else update_config_with_dtype_overrides(plugin.dtype_config, config)


def _in_one_sentence(run: RunConfig, error: Exception) -> str:
    """Megatron's words, the place in its source where it has none, and where to look."""
    said = " ".join(str(error).split())
    if not said:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{place.line} ({place.filename.rpartition('/')[2]}:{place.lineno})"
    return (
        f"Megatron refuses recipe={run.recipe} with these settings, change parallel.* or recompute.*: {said}"
    )


def _chunk_tokens(run: RunConfig, config: AnchoredGPTConfig) -> int:
    """Tokens a visit of the head takes on a GPU."""
    return resolve_chunk_tokens(
        run.loss.chunk_tokens,
        num_tokens=tokens_of(run) * run.trainer.micro_batch_size,
        objective=config.objective,
        shard=config.vocab_shard(),
        dtype=torch.float32,
        device=torch.device("cuda"),
        visits_head=True,
    )


def tokens_of(run: RunConfig) -> int:
    """Tokens of a row on one context-parallel rank."""
    return run.data.sequence_length // run.parallel.cp_size
