"""What a run cost in the end: summary.json in the run's folder."""

from __future__ import annotations

import logging
import resource
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from asft_nemo.nemo.callbacks import is_writer
from asft_nemo.nemo.schedule import PrepassCallback
from asft_nemo.reference import ReferenceBytes
from asft_nemo.run_dir import write_json

logger = logging.getLogger(__name__)


class SummaryCallback(Callback):
    """Adds up what this start of the run spent on the reference and writes summary.json when training ends.

    `steps`, `seconds`, `reference_seconds` (of all prepasses) and `reference_share` count this start alone, not steps before a resume.
    `reference_device_bytes` and `reference_host_bytes` are the most any rank holds between steps, `reference_hidden_bytes` the most
    hidden states kept during a step, `reference_disk_bytes` the cache; `cache_hit_rate` the mean over steps, null without a cache.
    `policy_parameter_bytes` is the most any rank holds of the policy, to compare with; `peak_device_bytes` and `peak_rss_bytes` the most
    any rank's allocator (0 on a CPU) and process ever had.

    Args:
        run_dir: folder of the run.
        prepass: holds the reference.
    """

    def __init__(self, run_dir: Path, prepass: PrepassCallback):
        self.path, self.prepass = run_dir / "summary.json", prepass
        self._steps, self._reference_seconds, self._hits = 0, 0.0, []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()
        self._hits: list[float] = []
        self._hidden_bytes = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        """Adds a step."""
        self._steps += 1
        self._reference_seconds += self.prepass.reference_seconds
        if self.prepass.prepass is not None:
            self._hidden_bytes = max(self._hidden_bytes, sum(self.prepass.prepass.kept_bytes.values()))
        if self.prepass.hit_rate is not None:
            self._hits.append(self.prepass.hit_rate)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Collective: one all-reduce of seven values over all ranks; the run's writing rank writes."""
        reference = self.prepass.reference
        held = ReferenceBytes() if reference is None else reference.held()
        policy = sum(p.nbytes for chunk in trainer.strategy.megatron_parallel for p in chunk.parameters())
        most = torch.tensor(
            [
                *(held.device, held.host, held.disk, self._hidden_bytes, policy),
                torch.cuda.max_memory_allocated(),
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            ],
            dtype=torch.int64,
            device=torch.cuda.current_device(),
        )
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        if not is_writer():
            return
        device, host, disk, hidden, policy, peak_device, peak_rss = most.tolist()
        seconds = time.perf_counter() - self._started
        summary = {
            "steps": self._steps,
            "seconds": seconds,
            "reference_seconds": self._reference_seconds,
            "reference_share": self._reference_seconds / seconds if seconds else 0.0,
            "reference_device_bytes": device,
            "reference_host_bytes": host,
            "reference_disk_bytes": disk,
            "reference_hidden_bytes": hidden,
            "policy_parameter_bytes": policy,
            "peak_device_bytes": peak_device,
            "peak_rss_bytes": peak_rss,
            "cache_hit_rate": sum(self._hits) / len(self._hits) if self._hits else None,
        }
        write_json(self.path, summary)
        logger.info(
            "the reference took %.1f of %.1f s (%.0f %%) and at most %.1f MiB on a device, %.1f MiB on a host, %.1f MiB on disk, "
            "%.1f MiB of hidden states during a step",
            self._reference_seconds,
            seconds,
            100 * summary["reference_share"],
            *(size / 2**20 for size in (device, host, disk, hidden)),
        )
