"""The loss: its definition, and implementations over a sharded vocabulary that agree with it."""

from asft_nemo.losses.dense import dense_loss
from asft_nemo.losses.reduce import LossOutput
from asft_nemo.losses.vocab_parallel import vocab_parallel_loss
from asft_nemo.losses.vocab_shard import VocabShard

__all__ = [
    "LossOutput",
    "VocabShard",
    "dense_loss",
    "vocab_parallel_loss",
]
