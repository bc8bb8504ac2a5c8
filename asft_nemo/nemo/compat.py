"""Work-arounds for NeMo 2.7.3 and Megatron-core 0.15.3, each with its reason; nothing here changes what is computed."""

from __future__ import annotations

from typing import Any

import torch
from nemo.lightning import MegatronStrategy
from nemo.lightning._strategy_lib import init_model_parallel


class AnchoredStrategy(MegatronStrategy):
    """NeMo's strategy, usable for several fits in one process.

    * `setup_distributed` returns early when torch.distributed is up already and then leaves the previous run's model-parallel groups
      in place (nemo 2.7.3): the groups of this run are made here.
    * Megatron's number-of-micro-batches calculator refuses a second run with other batch sizes: it is cleared.
    * `timers` (nemo's ProgressPrinter all-gathers them on rank 0 only and deadlocks): none.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.timers = None

    def setup_distributed(self) -> None:
        """Starts or re-uses torch.distributed and makes this run's model-parallel groups."""
        from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

        again = torch.distributed.is_initialized()
        destroy_num_microbatches_calculator()
        super().setup_distributed()
        if again:
            init_model_parallel(self.model)
