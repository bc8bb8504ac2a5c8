"""`train(run)`: what every rank runs, whoever started it (asft train, torchrun, NeMo-Run)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from asft_nemo.config import machine, rules
from asft_nemo.config.schema import RunConfig, from_dict, to_dict
from asft_nemo.errors import ConfigError

if TYPE_CHECKING:
    from asft_nemo.data import Prepared

_GO_ON = "start the run again with trainer.resume=if_exists"
_AGAIN = "start the same command again"


def train(run: RunConfig, *, data: Prepared | None = None) -> None:
    """Fine-tunes as `run` says and leaves run.json, metrics.jsonl, TensorBoard events and checkpoints in `run.run.dir`.

    Called once on every rank, with torchrun's environment (or none, for one rank).

    Args:
        run: the settings.
        data: what `asft_nemo.data.prepare` made of them, where the caller has it.

    Raises:
        asft_nemo.errors.UserError: settings, data or checkpoints that do not fit; the sentence names the cure.
    """
    run = _checked(run)  # NeMo-Run hands over a copy that may have been changed and is not frozen
    with _watched(run, again=_GO_ON):
        _train(run, data)


def _train(run: RunConfig, data: Prepared | None) -> None:
    from asft_nemo.cpu import backend

    backend.install()
    from asft_nemo.data import prepare
    from asft_nemo.logs import quiet_upstream
    from asft_nemo.model import read_model_spec
    from asft_nemo.nemo.build import build
    from asft_nemo.run_dir import base_checkpoint, claim_run_dir, hf_dir, resume_from

    quiet_upstream()
    data = data if data is not None else prepare(run, tokenizer_dir=hf_dir(run))
    claim_run_dir(run, data_fingerprint=data.fingerprint)
    base_dir = base_checkpoint(run)
    resume = resume_from(run)
    parts = build(
        run,
        spec=read_model_spec(base_dir / "context" / "hf"),
        base_dir=base_dir,
        data=data,
        resume=resume,
    )
    parts.trainer.fit(parts.model, datamodule=parts.data, ckpt_path=None if resume is None else str(resume))


def cache_reference(run: RunConfig, *, repair: bool) -> None:
    """Computes the frozen base's hidden states of all examples of a training run and stores them in its cache.

    Called once on every rank, like `train`, with the settings of the run that will read the cache.

    Args:
        run: the settings, `reference=cached`.
        repair: first check what is stored, and compute again what is damaged.

    Raises:
        asft_nemo.errors.UserError: as `train`.
    """
    run = _checked(run)
    with _watched(run, again=_AGAIN):
        _cache_reference(run, repair=repair)


def _cache_reference(run: RunConfig, *, repair: bool) -> None:
    from asft_nemo.cpu import backend

    backend.install()
    from asft_nemo.data import prepare
    from asft_nemo.logs import quiet_upstream
    from asft_nemo.model import read_model_spec
    from asft_nemo.nemo import cache_job
    from asft_nemo.run_dir import base_checkpoint, hf_dir

    quiet_upstream()
    data = prepare(run, tokenizer_dir=hf_dir(run))
    base_dir = base_checkpoint(run)
    spec = read_model_spec(base_dir / "context" / "hf")
    cache_job.cache_reference(run, spec=spec, data=data, base_dir=base_dir, repair=repair)


def write_logits(run: RunConfig, *, weights_dir: Path, tokens_file: Path, out_file: Path) -> None:
    """Writes a checkpoint's logits on given tokens, computed at the layout of `run`. Called once on every rank, like `train`.

    Arguments: see `asft_nemo.nemo.logits_job.write_logits`.

    Raises:
        asft_nemo.errors.UserError: as `train`.
    """
    run = _checked(run)
    with _watched(run, again=_AGAIN):
        _write_logits(run, weights_dir=weights_dir, tokens_file=tokens_file, out_file=out_file)


def _write_logits(run: RunConfig, *, weights_dir: Path, tokens_file: Path, out_file: Path) -> None:
    from asft_nemo.cpu import backend

    backend.install()
    from asft_nemo.logs import quiet_upstream
    from asft_nemo.model import read_model_spec
    from asft_nemo.nemo import logits_job
    from asft_nemo.run_dir import hf_dir

    quiet_upstream()
    spec = read_model_spec(hf_dir(run))
    logits_job.write_logits(
        run,
        spec=spec,
        hf_dir=hf_dir(run),
        weights_dir=weights_dir,
        tokens_file=tokens_file,
        out_file=out_file,
    )


def _checked(run: RunConfig) -> RunConfig:
    run = from_dict(to_dict(run))
    rules.check(run)
    _check_world(run)
    machine.order_kernels_on_the_device(run.parallel)
    return run


def _watched(run: RunConfig, *, again: str) -> contextlib.AbstractContextManager[None]:
    """From here on a rank that hangs is named."""
    from asft_nemo.hang_watch import watched

    return watched(run.alarms.hang_seconds, ranks=run.run.world_size, again=again)


def _check_world(run: RunConfig) -> None:
    """The ranks that were started are the ranks that the batch sizes and run.json speak of.

    Raises:
        ConfigError: they are not.
    """
    started = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")))
    if started != run.run.world_size:
        raise ConfigError(
            f"{started} ranks were started, but run.world_size={run.run.world_size}: start as many as that, or set run.world_size={started}"
        )
