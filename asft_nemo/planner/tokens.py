"""How many tokens of a micro batch a rank has."""

from __future__ import annotations

from dataclasses import dataclass

from asft_nemo.config.schema import RunConfig


@dataclass(frozen=True)
class Tokens:
    """A micro batch on one rank.

    Attributes:
        whole: T, tokens of the rank's tensor-parallel group.
        shared: the rank's own between linear layers: T / t under sequence parallelism, else T.
        keys: tokens that attention looks at in a row, for attention that keeps its scores.
    """

    whole: int
    shared: int
    keys: int

    @classmethod
    def of(cls, run: RunConfig) -> Tokens:
        """Those of the policy's micro batches."""
        layout, length = run.parallel, run.data.sequence_length
        whole = length * run.trainer.micro_batch_size // layout.cp_size
        return cls(whole, whole // (layout.tp_size if layout.sequence_parallel else 1), length)
