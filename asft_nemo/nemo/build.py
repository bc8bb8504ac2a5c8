"""From a RunConfig to NeMo's parts: model, data module, trainer. Only values and wiring; every default is in the schema."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nemo.lightning as nl
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo.lightning.pytorch.optim import MegatronOptimizerModule
from nemo.lightning.pytorch.strategies.utils import RestoreConfig

from asft_nemo.config import machine
from asft_nemo.config.model_shape import read_model_shape
from asft_nemo.config.schema import RunConfig
from asft_nemo.config.tables import OPTIONS
from asft_nemo.cpu import backend
from asft_nemo.data import Prepared, domain_names, training_order
from asft_nemo.data.ordering import padding_multiple
from asft_nemo.model import ModelSpec, megatron_config_kwargs, padded_vocab_size
from asft_nemo.nemo import switches
from asft_nemo.nemo.alarms import Alarms, CurveAlarms
from asft_nemo.nemo.callbacks import MetricsCallback, is_writer
from asft_nemo.nemo.checkpoints import CheckpointCallback
from asft_nemo.nemo.compat import AnchoredStrategy
from asft_nemo.nemo.datamodule import AnchoredDataModule
from asft_nemo.nemo.gpt_model import AnchoredGPTConfig, ASFTModel
from asft_nemo.nemo.hangs import HangCallback
from asft_nemo.nemo.keep import Keep
from asft_nemo.nemo.layer_spec import choose_layers, kernels_line
from asft_nemo.nemo.lora import AdapterSpec, AdapterStrategy, LoraCallback
from asft_nemo.nemo.nonfinite import NonfiniteGuard
from asft_nemo.nemo.optim import WarmupSchedule
from asft_nemo.nemo.precision import optimizer_precision, precision_plugin, precision_row, require_kernels
from asft_nemo.nemo.preemption import preemption
from asft_nemo.nemo.profiling import RangesCallback, profiler_of
from asft_nemo.nemo.references import Frozen, reference_builder, snapshot_builder
from asft_nemo.nemo.schedule import PrepassCallback
from asft_nemo.nemo.speed import SpeedMeter
from asft_nemo.nemo.start import SameStart
from asft_nemo.nemo.stragglers import straggler_callbacks
from asft_nemo.nemo.summary import SummaryCallback
from asft_nemo.run_dir import adapter_description, initial_adapters
from asft_nemo.wandb_run import WandbRun

logger = logging.getLogger(__name__)


@dataclass
class Parts:
    """What one fit needs."""

    trainer: nl.Trainer
    model: ASFTModel
    data: AnchoredDataModule
    prepass: PrepassCallback


def _several(files: tuple[str, ...]) -> list[str]:
    """Names of files whose metrics are kept apart; none where there is one file."""
    return list(domain_names(files)) if len(files) > 1 else []


def _row_lengths(run: RunConfig) -> dict[str, Any]:
    """Megatron's switches for micro batches of several lengths, whose shapes pipeline stages tell one another."""
    if not run.data.group_by_length:
        return {}
    # Megatron refuses its default dispatcher of experts with such shapes, also where a model has no experts.
    return {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}


def model_config(run: RunConfig, spec: ModelSpec) -> AnchoredGPTConfig:
    """The model's configuration: architecture from the checkpoint, layout and objective from the run."""
    options = {name: getattr(run.objective, name) for name in OPTIONS}
    layout, dtype = run.parallel, precision_row(run.precision).compute_dtype
    choose_layers(run.kernels.layers, run.precision)
    return AnchoredGPTConfig(
        **megatron_config_kwargs(spec),
        **switches.layer_kernels(run),
        gradient_accumulation_fusion=switches.fused_gradients(run),
        vocab_size=padded_vocab_size(spec.vocab_size, tp_size=layout.tp_size),
        hf_vocab_size=spec.vocab_size,
        seq_length=run.data.sequence_length,
        **_row_lengths(run),
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=layout.vpp_size,
        context_parallel_size=layout.cp_size,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=dtype,
        **switches.point_to_point(run),
        calculate_per_token_loss=True,
        **pipeline_shares(run),
        **switches.recomputed(run),
        objective_name=run.objective.name,
        kl_weight=run.objective.kl_weight,
        kl_direction=run.objective.kl_direction,
        objective_options={name: value for name, value in options.items() if value is not None},
        loss_implementation=run.loss.implementation,
        loss_chunk_tokens=run.loss.chunk_tokens,
        normalize_by=run.loss.normalize_by,
        domains=_several(run.data.train),
        validation_domains=_several(run.data.validation),
        adapters=adapter_spec(run),
    )


def pipeline_shares(run: RunConfig) -> dict[str, Any]:
    """Megatron's arguments for how layers are shared out over pipeline stages."""
    layout = run.parallel
    return {
        "num_layers_in_first_pipeline_stage": layout.first_stage_layers,
        "num_layers_in_last_pipeline_stage": layout.last_stage_layers,
        "account_for_embedding_in_pipeline_split": layout.account_for_embedding,
        "account_for_loss_in_pipeline_split": layout.account_for_loss,
    }


def adapter_spec(run: RunConfig) -> AdapterSpec | None:
    """The policy's adapters, or None for full fine-tuning."""
    peft = run.peft
    if peft.name == "none":
        return None
    return AdapterSpec(
        rank=peft.rank, alpha=peft.alpha, dropout=peft.dropout, targets=peft.targets, seed=run.run.seed
    )


def optimizer(run: RunConfig, max_steps: int) -> MegatronOptimizerModule:
    """AdamW with NeMo's schedule."""
    optim = run.optim
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        use_distributed_optimizer=optim.distributed,
        overlap_param_gather=optim.overlap_param_gather,
        **optimizer_precision(run.precision),
    )
    return MegatronOptimizerModule(
        config=switches.offload_state(config, run),
        lr_scheduler=WarmupSchedule(
            optim.schedule,
            max_steps=max_steps,
            warmup_steps=math.ceil(optim.warmup_ratio * max_steps) if optim.warmup_ratio else 0,
            min_lr=optim.lr * optim.min_lr_ratio,
        ),
    )


def strategy(run: RunConfig, base_dir: Path, *, resuming: bool) -> AnchoredStrategy:
    """NeMo's Megatron strategy for this layout; the base weights are read unless a checkpoint will be (or `LoraCallback` reads them)."""
    layout, adapted = run.parallel, run.peft.name == "lora"
    return (AdapterStrategy if adapted else AnchoredStrategy)(
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=layout.vpp_size,
        context_parallel_size=layout.cp_size,
        sequence_parallel=layout.sequence_parallel,
        **pipeline_shares(run),  # NeMo's strategy writes its own over the model's
        pipeline_dtype=precision_row(run.precision).compute_dtype,
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=run.optim.distributed,
            overlap_grad_reduce=run.optim.overlap_grad_reduce,
            overlap_param_gather=run.optim.overlap_param_gather,
            grad_reduce_in_fp32=True,
            # per-token averaging divides once, by the global token count: no averaging in the collective
            average_in_collective=False,
            check_for_nan_in_grad=False,  # NonfiniteGuard looks, on all ranks, and waits for the device once a step
        ),
        ckpt_async_save=False,
        ckpt_optim_fully_reshardable=True,
        distrib_optim_fully_reshardable_mem_efficient=True,
        process_group_backend="gloo" if backend.active() else "nccl",
        restore_config=None
        if resuming or adapted
        else RestoreConfig(path=str(base_dir), load_model_state=True, load_optim_state=False),
    )


def build(run: RunConfig, *, spec: ModelSpec, base_dir: Path, data: Prepared, resume: Path | None) -> Parts:
    """Everything one fit needs.

    Args:
        run: the settings.
        spec: architecture of the base model.
        base_dir: the base checkpoint in NeMo form (`weights/`, `context/`).
        data: tokenised training and validation sets and the number of steps.
        resume: the checkpoint of this run that will be read, None for a fresh start from the base weights.

    Raises:
        ConfigError: the run's precision needs kernels that are not here.
    """
    machine.order_kernels_on_the_device(run.parallel)  # for who comes by another way than `train`
    require_kernels(run.precision)
    run_dir = Path(run.run.dir)
    config = model_config(run, spec)
    max_steps = data.max_steps
    logger.info(kernels_line())
    model = ASFTModel(config, optim=optimizer(run, max_steps))
    module = AnchoredDataModule(
        data.train,
        data.validation,
        sequence_length=run.data.sequence_length,
        micro_batch_size=run.trainer.micro_batch_size,
        global_batch_size=run.trainer.global_batch_size,
        order=training_order(run, data.train),
        padding_multiple=padding_multiple(run),
    )
    prepass = PrepassCallback(
        config,
        reference_builder(Frozen(run, model, spec, data, base_dir)),
        snapshot_builder(run, model, resume),
        reference_micro_batch_size=run.reference.micro_batch_size,
        sample_ids_of_step=module.sample_ids_of_step if run.reference.form == "cached" else None,
    )
    alarms = Alarms(run_dir, is_writer)
    guard = NonfiniteGuard(
        on_nonfinite=run.trainer.on_nonfinite, max_skips=run.trainer.max_skips, alarms=alarms
    )
    # adapters that were trained before are away from the base from the start, by however much
    bounded = config.objective.needs_reference and run.peft.adapter is None
    metrics = MetricsCallback(
        run_dir,
        prepass,
        guard,
        max_steps=max_steps,
        max_initial_kl=run.reference.max_initial_kl if bounded else None,
        validate_every=run.trainer.validate_every,
        speed=SpeedMeter(run, read_model_shape(base_dir)),
        profiler=profiler_of(run, max_steps),
        description=run.objective.name,
        alarms=CurveAlarms(run.alarms, alarms),
        wandb=WandbRun(run) if run.trainer.wandb is not None else None,
    )
    checkpoints = CheckpointCallback(
        run_dir,
        base_dir,
        prepass,
        adapters=adapter_description(run),
        metrics=metrics,
        every=run.trainer.checkpoint_every,
        max_steps=max_steps,
        keep=Keep(run.trainer.keep, run_dir),
    )
    ranks_here, machines = _machines(run)
    started = None if resume is not None else initial_adapters(run, base_dir)
    adapters = [] if config.adapters is None else [LoraCallback(base_dir, started, seed=run.run.seed)]
    trainer = nl.Trainer(
        accelerator="cpu" if backend.active() else "gpu",
        devices=ranks_here,
        num_nodes=machines,
        max_steps=max_steps,
        max_epochs=-1,
        strategy=strategy(run, base_dir, resuming=resume is not None),
        plugins=precision_plugin(run.precision),
        callbacks=[
            HangCallback(),
            SameStart(resume, data),
            *adapters,
            *switches.tensor_overlap(run),
            prepass,
            guard,
            metrics,
            *straggler_callbacks(run.alarms, alarms, prepass),
            checkpoints,
            SummaryCallback(run_dir, prepass),
            RangesCallback(),
            *preemption(checkpoints),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    return Parts(trainer=trainer, model=model, data=module, prepass=prepass)


def _machines(run: RunConfig) -> tuple[int, int]:
    """Ranks on this machine and number of machines, from torchrun's environment (one machine without it)."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", run.run.world_size))
    return local, int(os.environ.get("WORLD_SIZE", run.run.world_size)) // local
