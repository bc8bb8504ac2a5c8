"""The model: NeMo's GPTModel around a Megatron GPTModel whose last stage computes the objective's loss.

No schedule, pipeline exchange or layer is changed. `labels` of Megatron's forward carries a `LossInputs` value to the last stage
(Megatron hands it through untouched); the reference's chunks stop at the final hidden states instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel as MegatronGPTModel
from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel
from torch import Tensor
from torch.distributed import ProcessGroup

from asft_nemo.losses import VocabShard
from asft_nemo.nemo.head import LossHead, LossInputs, LossSpec
from asft_nemo.nemo.layer_spec import layer_spec
from asft_nemo.nemo.lora import AdapterSpec, add_adapters, only_adapters
from asft_nemo.nemo.loss_reduction import TokenLossReduction
from asft_nemo.nemo.steps import data_step, forward_step
from asft_nemo.objectives import Objective, objective


class AnchoredGPTModel(MegatronGPTModel):
    """A Megatron GPT model that returns logits, final hidden states, or the loss.

    Args:
        loss_spec: the loss of the last stage when `labels` is a `LossInputs`.
        returns_hidden: the last stage returns final hidden states [S, B, H] instead of logits (the frozen reference).
    """

    def __init__(self, *args: Any, loss_spec: LossSpec, returns_hidden: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.loss_spec = loss_spec
        self.adapted = False
        self.returns_hidden = returns_hidden
        if self.post_process:
            # Same parameters, flags and hooks as Megatron built them; only forward is ours.
            self.output_layer.__class__ = LossHead

    def head_weight(self) -> Tensor:
        """This rank's rows of the head [V, H]: the tied embedding or the output layer's own weight (last stage only)."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        assert weight is not None
        return weight

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What a checkpoint holds of this chunk: with adapters these alone, also where it has none, for want of layers."""
        state = super().sharded_state_dict(*args, **kwargs)
        return only_adapters(state) if self.adapted else state

    def _postprocess(self, hidden_states: Tensor, *args: Any, labels: Any = None, **kwargs: Any):
        if not self.post_process:
            return hidden_states
        if self.returns_hidden:
            return hidden_states
        if isinstance(labels, LossInputs):
            weight = self.head_weight() if self.share_embeddings_and_output_weights else None
            return self.output_layer(hidden_states, weight=weight, loss_inputs=labels, spec=self.loss_spec)
        return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)


@dataclass
class AnchoredGPTConfig(GPTConfig):
    """NeMo's GPTConfig plus the objective and the loss, as plain values (NeMo serialises and rebuilds configs).

    Attributes:
        objective_name, kl_weight, kl_direction, objective_options: the objective, see `asft_nemo.objectives`.
        loss_implementation: a key of `asft_nemo.nemo.head.IMPLEMENTATIONS`.
        loss_chunk_tokens: see `asft_nemo.losses.fused_linear_loss`.
        normalize_by: ``tokens`` (one global mean) or ``micro_batch`` (mean of micro-batch means, as the authors average).
        domains, validation_domains: names of the training and the validation files, where there are several: their metrics are kept apart.
        hf_vocab_size: vocabulary rows of the Hugging Face checkpoint; `vocab_size` is padded for tensor parallelism.
        adapters: the policy's LoRA adapters, None for full fine-tuning.
        rope_scaling, rope_scaling_factor: Megatron's arguments for the scaled rotary embeddings of Llama 3.1 and later.
    """

    objective_name: str = ""
    kl_weight: float = 0.0
    kl_direction: str = "forward"
    objective_options: dict[str, Any] = field(default_factory=dict)
    loss_implementation: str = ""
    loss_chunk_tokens: Any = "auto"
    normalize_by: str = ""
    domains: list[str] = field(default_factory=list)
    validation_domains: list[str] = field(default_factory=list)
    hf_vocab_size: int = 0
    adapters: AdapterSpec | None = None
    rope_scaling: bool = False
    rope_scaling_factor: float = 1.0

    transformer_layer_spec: Callable = layer_spec
    forward_step_fn: Callable = forward_step
    data_step_fn: Callable = data_step

    @property
    def objective(self) -> Objective:
        """The row of the objective table with this run's weight, direction and options."""
        return objective(
            self.objective_name,
            kl_weight=self.kl_weight,
            kl_direction=self.kl_direction,
            **self.objective_options,
        )

    def vocab_shard(self) -> VocabShard:
        """This rank's rows of the vocabulary. The model-parallel groups must exist."""
        group = parallel_state.get_tensor_model_parallel_group()
        assert isinstance(group, ProcessGroup)
        return VocabShard.of_rank(
            group.rank(),
            group.size(),
            self.vocab_size,  # type: ignore[arg-type]
            self.hf_vocab_size,
            group,
            sequence_parallel=self.sequence_parallel,
        )

    def configure_model(  # type: ignore[override]
        self,
        tokenizer: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> AnchoredGPTModel:
        """Builds the policy's chunk for virtual stage `vp_stage` (None without virtual stages). `tokenizer` is not used."""
        chunk = self.build_chunk(vp_stage=vp_stage, pre_process=pre_process, post_process=post_process)
        if self.adapters is not None:
            add_adapters(chunk, self.adapters)
            chunk.adapted = True
            if self._recomputes_parameters() and chunk.pre_process:
                chunk.embedding.register_forward_hook(_with_gradient)
        return chunk

    def _recomputes_parameters(self) -> bool:
        """Whether layers that hold parameters are computed again; attention's products hold none."""
        mlp = self.recompute_granularity == "selective" and "mlp" in (self.recompute_modules or ())
        return mlp or self.recompute_granularity == "full"

    def build_chunk(
        self,
        *,
        vp_stage: int | None,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        returns_hidden: bool = False,
    ) -> AnchoredGPTModel:
        """Builds one model chunk on this rank, without adapters; `returns_hidden` for the frozen reference."""
        stage = vp_stage or 0
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        return AnchoredGPTModel(
            self,
            transformer_layer_spec=self.transformer_layer_spec(self, vp_stage=stage),  # type: ignore[operator]
            vocab_size=self.vocab_size,
            max_sequence_length=self.seq_length,
            pre_process=first if pre_process is None else pre_process,
            post_process=last if post_process is None else post_process,
            parallel_output=self.parallel_output,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type=self.position_embedding_type,
            rotary_percent=self.rotary_percent,
            rotary_base=self.rotary_base,
            seq_len_interpolation_factor=self.seq_len_interpolation_factor,
            rope_scaling=self.rope_scaling,
            rope_scaling_factor=self.rope_scaling_factor,
            scatter_embedding_sequence_parallel=self.scatter_embedding_sequence_parallel,
            vp_stage=stage,
            loss_spec=LossSpec(
                objective=self.objective,
                implementation=self.loss_implementation,
                vocab_size=self.hf_vocab_size,
                chunk_tokens=self.loss_chunk_tokens,
            ),
            returns_hidden=returns_hidden,
        )


def _with_gradient(embedding: Any, inputs: Any, hidden: Tensor) -> Tensor:
    """Makes a frozen embedding's output ask for a gradient: a recomputed layer none of whose inputs does would give its adapters none,
    and say nothing.
    """
    return hidden.requires_grad_() if torch.is_grad_enabled() else hidden


def core_chunks(wrapped: Iterable[Any]) -> list[AnchoredGPTModel]:
    """The Megatron models inside this rank's chunks, without the wrappers of Lightning, DDP and mixed precision."""
    chunks = []
    for chunk in wrapped:
        while not isinstance(chunk, AnchoredGPTModel):
            chunk = chunk.module
        chunks.append(chunk)
    return chunks


class ASFTModel(GPTModel):
    """NeMo's GPTModel with the objective's loss reduction; everything else is NeMo's."""

    @property
    def training_loss_reduction(self) -> TokenLossReduction:  # type: ignore[override]
        """The reduction of training steps."""
        config: Any = self.config
        if self._training_loss_reduction is None:
            self._training_loss_reduction = TokenLossReduction(
                normalize_by=config.normalize_by, domains=config.domains
            )
        return self._training_loss_reduction

    @property
    def validation_loss_reduction(self) -> TokenLossReduction:  # type: ignore[override]
        """Validation reduces like training."""
        config: Any = self.config
        if self._validation_loss_reduction is None:
            self._validation_loss_reduction = TokenLossReduction(
                normalize_by=config.normalize_by, domains=config.validation_domains
            )
        return self._validation_loss_reduction
