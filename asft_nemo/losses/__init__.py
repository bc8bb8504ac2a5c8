"""The loss: its definition, and implementations over a sharded vocabulary that agree with it."""

from asft_nemo.losses.dense import dense_loss
from asft_nemo.losses.fused_linear import (
    HeadGradient,
    fused_label_logprob,
    fused_linear_loss,
    fused_linear_token_losses,
)
from asft_nemo.losses.head_bytes import head_gradient_bytes
from asft_nemo.losses.reduce import LossOutput
from asft_nemo.losses.vocab_parallel import vocab_parallel_loss
from asft_nemo.losses.vocab_shard import VocabShard

__all__ = [
    "HeadGradient",
    "LossOutput",
    "VocabShard",
    "dense_loss",
    "fused_label_logprob",
    "fused_linear_loss",
    "fused_linear_token_losses",
    "head_gradient_bytes",
    "vocab_parallel_loss",
]
