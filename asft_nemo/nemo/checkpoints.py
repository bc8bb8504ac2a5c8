"""When checkpoints are written, which stay, and how one is complete or not there."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch.distributed.checkpoint.api import CheckpointException

from asft_nemo.checkpoint.adapters import ADAPTER_FILE, AdapterDescription
from asft_nemo.checkpoint.base_weights import nemo_base_sample
from asft_nemo.checkpoint.dist_metadata import read_metadata
from asft_nemo.checkpoint.seal import write_seal
from asft_nemo.checkpoint.staging import copy_contents, sync_directory, sync_small_files
from asft_nemo.errors import CheckpointError, UserError
from asft_nemo.nemo.callbacks import MetricsCallback, is_writer, most_of_ranks
from asft_nemo.nemo.keep import BEST, REMOVED, Keep
from asft_nemo.nemo.schedule import PrepassCallback
from asft_nemo.run_dir import point_at

_FULL_BYTES = 16 << 20  # what the writers of several ranks may leave of a disk that they filled
_HIDDEN_SECONDS = 60.0  # how long a network file system may not show what another machine has written: NFS's longest, unless told otherwise
_LOOK_SECONDS = 1.0


@contextlib.contextmanager
def full_disk_named(partial: Path) -> Iterator[None]:
    """Says that the disk is full where a write failed and it is: torch's and Megatron's writers end with errors of their own then.

    Raises:
        CheckpointError: next to nothing is free where `partial` was to be written.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter, of all ranks, is no Exception
        free = shutil.disk_usage(partial.parent).free
        if free > _FULL_BYTES:
            raise
        raise CheckpointError(
            f"{partial} cannot be written, for that disk is full ({free} bytes are free): make room, then go on from the checkpoint before it "
            "with trainer.resume=must"
        ) from error


def check_all_there(partial: Path, run_dir: Path) -> None:
    """Waits until this machine sees every file of tensors that some rank has written, in full.

    Where machines do not share the run's folder each writes into its own, nobody fails, and the first rank's is short of the others' files.

    Raises:
        CheckpointError: a minute later some are still not there.
    """
    ends: dict[Path, int] = {}
    for metadata in partial.rglob(".metadata"):  # of the weights, and of a snapshot
        for place in read_metadata(metadata.parent).storage_data.values():
            file = metadata.parent / place.relative_path
            ends[file] = max(ends.get(file, 0), place.offset + place.length)
    until = time.monotonic() + _HIDDEN_SECONDS
    while missing := [file for file, end in ends.items() if not _holds(file, end)]:
        if time.monotonic() > until:
            raise CheckpointError(
                f"{partial} is not a whole checkpoint, and the one before it stays: {len(missing)} of {len(ends)} files that ranks wrote are not "
                f"in run.dir={run_dir} on the first rank's machine: put run.dir on a file system that all machines share"
            )
        time.sleep(_LOOK_SECONDS)


def _holds(file: Path, nbytes: int) -> bool:
    try:
        return file.stat().st_size >= nbytes
    except FileNotFoundError:
        return False


class CheckpointCallback(Callback):
    """Writes ``checkpoints/step_N`` with NeMo's distributed checkpointing and moves ``checkpoints/latest`` after a complete write.

    A checkpoint is written under a temporary name and renamed when every rank has finished; a kill in between leaves the previous
    ``latest`` as it was. The reference is in no checkpoint.

    Args:
        run_dir: folder of the run.
        base_dir: the base checkpoint; its `context/` goes along, so that a checkpoint exports on its own.
        prepass: holds the snapshot of the policy, where there is one.
        adapters: what the checkpoint's `context/` says of them; None where it holds the whole model.
        metrics: tells what a validation found; comes before this callback.
        every: steps between checkpoints, None for only the last.
        max_steps: last step of the run.
        keep: which checkpoints stay.
    """

    def __init__(
        self,
        run_dir: Path,
        base_dir: Path,
        prepass: PrepassCallback,
        *,
        adapters: AdapterDescription | None,
        metrics: MetricsCallback,
        every: int | None,
        max_steps: int,
        keep: Keep,
    ):
        self.dir = run_dir / "checkpoints"
        self.base_dir = base_dir
        self.prepass = prepass
        self.adapters, self.metrics = adapters, metrics
        self.every, self.max_steps, self.keep = every, max_steps, keep

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when due, and where a validation was the best. Collective: one all-reduce of one value after a validation."""
        step, best = trainer.global_step, False
        if self.keep.metric is not None and self.metrics.validated == step:
            # only the writing rank knows it; the others are below whatever it says
            best = self.keep.is_best(-most_of_ranks(-self.metrics.validation_value(self.keep.metric)))
        if best or step == self.max_steps or (self.every and step % self.every == 0):
            self.save(trainer, step, best=best)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Finds what was best before a resume, and removes what writes that were killed have left: each may be as large as a checkpoint.

        Collective where the best stays: two all-reduces of one value.
        """
        if self.keep.metric is not None:
            self._restore_best()
        if trainer.is_global_zero:
            for left in (*self.dir.glob("partial_step_*"), *self.dir.glob(f"{REMOVED}*")):
                shutil.rmtree(left, ignore_errors=True)

    def _restore_best(self) -> None:
        """All ranks go on from the same best, or only some of them would take a later step for one and save it.

        A network file system may hide a new link from some machines for a while, so the newest that any rank sees counts. The metrics are read
        by the one rank that writes them, which has mended them by now.

        Raises:
            UserError: on every rank, where there is a best checkpoint and nothing says how good it is: a worse one would replace it.
        """
        own = self.keep.best_step()
        step = int(most_of_ranks(-1 if own is None else own))
        known = step >= 0 and is_writer()
        value = -most_of_ranks(-(self.keep.value_at(step) if known else math.inf))
        if value == -math.inf:
            raise UserError(
                f"{self.dir / BEST} leads to step {step}, and metrics.jsonl does not say the {self.keep.metric} of that step: restore the file, "
                f"or remove the link to choose the best anew (the checkpoint of step {step} is then removed with the next one that is kept)"
            )
        self.keep.restore(value)

    def save(self, trainer: Any, step: int, *, best: bool) -> None:
        """Writes the checkpoint of `step`. Collective over all ranks."""
        partial, final = self.dir / f"partial_step_{step}", self.dir / f"step_{step}"
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            partial.mkdir(parents=True)
        trainer.strategy.barrier()
        with full_disk_named(partial):
            trainer.save_checkpoint(str(partial))
            self.prepass.finish_writing()
            self.prepass.save_snapshot(partial)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            with full_disk_named(partial):
                self._finish(partial)
            partial.rename(final)
            sync_directory(self.dir)  # the name is on the disk before the checkpoint before it goes
            point_at(self.dir, "latest", final.name)
            sync_directory(self.dir)
            self.keep.tidy(step, best=best)
        trainer.strategy.barrier()

    def _finish(self, partial: Path) -> None:
        """What one rank adds to the weights, and the seal; afterwards all of it is on the disk.

        Raises:
            CheckpointError: as `check_all_there`; the launcher then ends the other ranks, which wait.
        """
        check_all_there(partial, self.dir.parent)
        copy_contents(self.base_dir / "context", partial / "context")
        shutil.copyfile(self.dir.parent / "run.json", partial / "context" / "run.json")
        if self.adapters is not None:
            (partial / "context" / ADAPTER_FILE).write_text(
                self.adapters.to_json(base_sample=nemo_base_sample(self.base_dir))
            )
        write_seal(partial)
        sync_small_files(partial, but=".distcp")
