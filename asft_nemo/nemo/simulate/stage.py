"""One rank of one pipeline stage without data: this project's model under DDP, its optimizer and reference, and a micro batch through it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor
from nemo.lightning.megatron_parallel import MegatronParallel
from torch import Tensor, nn

from asft_nemo.config.schema import RunConfig
from asft_nemo.model import ModelSpec
from asft_nemo.nemo import build
from asft_nemo.nemo.gpt_model import AnchoredGPTConfig, AnchoredGPTModel, ASFTModel, core_chunks
from asft_nemo.nemo.precision import precision_plugin, precision_row
from asft_nemo.nemo.references import alike, reference_config
from asft_nemo.nemo.simulate.flight import ChunkBytes
from asft_nemo.nemo.simulate.meter import Span, WithoutData
from asft_nemo.nemo.simulate.stand_ins import gather_for_adapters
from asft_nemo.nemo.simulate.world import config_on_gpu, tokens_of
from asft_nemo.nemo.steps import forward_step
from asft_nemo.reference.frozen import FrozenChunks, frozen_config

_NO_DIRECTORY = Path()  # nothing is read


@dataclass
class Stage:
    """What a rank holds between steps.

    Attributes:
        run, config: the settings and the policy's config.
        parallel: the policy's chunks in NeMo's wrapper, with Megatron's DDP inside.
        optimizers: Megatron's own inside NeMo's.
        copies: frozen copies of the policy's chunks, by what they are for: ``reference``, ``snapshot``.
        meter: counts bytes.
    """

    run: RunConfig
    config: AnchoredGPTConfig
    parallel: Any
    optimizers: list[Any]
    copies: dict[str, FrozenChunks]
    meter: WithoutData

    @property
    def chunks(self) -> list[AnchoredGPTModel]:
        """Megatron's models, by virtual stage."""
        return core_chunks(self.parallel)


def build_stage(run: RunConfig, spec: ModelSpec, *, kernels: str, meter: WithoutData) -> Stage:
    """Builds all that this rank holds, in the order of a run. The model-parallel groups must exist, and `meter` be active.

    Arguments: see `asft_nemo.nemo.simulate.world.config_on_gpu`.
    """
    config, plugin = config_on_gpu(run, spec, kernels=kernels), precision_plugin(run.precision)
    optim = build.optimizer(run, max_steps=1)
    models = []
    for stage in _virtual_stages(run):
        model: Any = ASFTModel(config, optim=optim)
        model.configure_model(vp_stage=stage)
        if kernels == "te" and not run.parallel.tp_comm_overlap:
            gather_for_adapters(model.module)
        models.append(model)
    parallel = MegatronParallel(
        nn.ModuleList(models),
        precision_plugin=plugin,  # type: ignore[arg-type]
        vp_size=run.parallel.vpp_size,
        ddp_config=build.strategy(run, _NO_DIRECTORY, resuming=False).ddp_config,  # type: ignore[arg-type]
        cpu=True,
        convert_module_fn=None if plugin is None else plugin.convert_module,
    )
    parallel.init_model_parallel()
    parallel.init_ddp()  # which NeMo leaves out where there is no trainer
    optimizers = [part for wrapped in optim.optimizers(parallel) for part in _parts(wrapped)]
    return Stage(run, config, parallel, optimizers, _copies(run, config), meter)


def _virtual_stages(run: RunConfig) -> Sequence[int | None]:
    return [None] if run.parallel.vpp_size is None else range(run.parallel.vpp_size)


def _parts(wrapped: Any) -> list[Any]:
    """Megatron's optimizers inside NeMo's."""
    whole = wrapped.mcore_optimizer
    return list(getattr(whole, "chained_optimizers", [whole]))


def _copies(run: RunConfig, policy: AnchoredGPTConfig) -> dict[str, FrozenChunks]:
    """The frozen models that this run builds, their weights left as they are."""
    objective, made = policy.objective, {}
    configs = {}
    if objective.needs_reference and run.reference.form in ("resident", "offloaded", "cached"):
        configs["reference"] = reference_config(run, policy)
    if objective.needs_old_policy:
        configs["snapshot"] = frozen_config(policy)
    for name, config in configs.items():
        made[name] = FrozenChunks(
            lambda stage, config=config: alike(config.build_chunk(vp_stage=stage, returns_hidden=True), run),
            vp_size=run.parallel.vpp_size,
            dtype=precision_row(run.precision).compute_dtype,
        )
    return made


@dataclass(frozen=True)
class Traced:
    """One micro batch through one chunk.

    Attributes:
        bytes: what the schedule needs to know.
        loss: the most that the loss held beyond the hidden states it was given; 0 before the last stage.
        persistent: what stays after the first micro batch: Megatron's shared buffers, tables of rotary embeddings.
        output: shape of what goes to the next stage, None from the last.
    """

    bytes: ChunkBytes
    loss: int
    persistent: int
    output: tuple[int, ...] | None


def trace(stage: Stage, index: int) -> Traced:
    """One forward and one backward pass of a virtual stage; all tokens count.

    The output of a stage that is not the last is freed once it would have been sent, as Megatron's schedules do.
    """
    meter, chunk, wrapped = stage.meter, stage.chunks[index], stage.parallel[index].module
    gc.collect()
    before, loss = meter.live, _watch_loss(meter, chunk)
    with meter.span() as forward:
        output: Any = forward_step(wrapped, _micro_batch(stage, chunk))
        _let_go_of_input(chunk)
    shape = None if chunk.post_process else tuple(output.shape)
    gradient = None if chunk.post_process else torch.empty_like(output)
    if shape is not None:
        deallocate_output_tensor(output, stage.config.deallocate_pipeline_outputs)
    left = meter.live - (0 if gradient is None else gradient.nbytes)
    with meter.span() as backward, wrapped.no_sync():
        custom_backward(output.loss_sum if chunk.post_process else output, gradient)
    del output, gradient
    for parameter in chunk.parameters():
        parameter.grad = None
    gc.collect()
    persistent = meter.live - before
    return Traced(
        ChunkBytes(left - meter.live, forward.rise - persistent, backward.peak - meter.live),
        loss=sum(span.rise for span in loss),
        persistent=persistent,
        output=shape,
    )


def _micro_batch(stage: Stage, chunk: AnchoredGPTModel) -> dict[str, Any]:
    """What the forward step of this chunk takes, and the stage's input in the chunk's hands."""
    run, config, objective = stage.run, stage.config, stage.config.objective
    rows, tokens = run.trainer.micro_batch_size, tokens_of(run)
    batch: dict[str, Any] = {
        name: torch.empty(rows, tokens, dtype=torch.int64) for name in ("tokens", "labels", "position_ids")
    }
    batch["loss_mask"] = torch.empty(rows, tokens, dtype=torch.bool)
    batch["attention"] = {"attention_mask": None}
    if not chunk.pre_process:
        chunk.set_input_tensor(hidden_states(run, config).requires_grad_())
    if chunk.post_process:
        if objective.divergence is not None:
            batch["ref_hidden"], batch["ref_head"] = hidden_states(run, config), _reference_head(stage)
        for name, read in (("ref", "ref_label_logprob"), ("old", "old_label_logprob")):
            if read in objective.reads:
                batch[f"{name}_logprob"] = torch.empty(rows, tokens, dtype=torch.float32)
    return batch


def hidden_states(run: RunConfig, config: AnchoredGPTConfig) -> Tensor:
    """What lies between two pipeline stages, [S, B, H] of this rank."""
    shared = run.parallel.tp_size if run.parallel.sequence_parallel else 1
    shape = tokens_of(run) // shared, run.trainer.micro_batch_size, config.hidden_size
    return torch.empty(*shape, dtype=precision_row(run.precision).compute_dtype)


def _reference_head(stage: Stage) -> Tensor | None:
    """The reference's head; with adapters switched off the policy's own."""
    reference = stage.copies.get("reference")
    return stage.chunks[-1].head_weight().detach() if reference is None else reference.head()


def _watch_loss(meter: WithoutData, chunk: AnchoredGPTModel) -> list[Span]:
    """Measures the output layer's next forward pass, in which the loss is computed; the span is there afterwards, on the last stage."""
    spans: list[Span] = []
    handles: list[Any] = []

    def enter(*_: Any) -> None:
        spans.append(meter.begin())

    def leave(*_: Any) -> None:
        meter.end(spans[0])
        for handle in handles:
            handle.remove()

    if chunk.post_process:
        layer: Any = chunk.output_layer
        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    return spans


def _let_go_of_input(chunk: AnchoredGPTModel) -> None:
    """The stage's input is the schedule's from here on: what of it is needed, autograd holds."""
    if not chunk.pre_process:
        chunk.decoder.set_input_tensor(None)  # type: ignore[arg-type]
