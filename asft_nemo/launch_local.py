"""Starts ranks on this machine with torchrun and waits for them; one group of ranks can do several runs after another."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from asft_nemo.config.fp8 import require_fp8
from asft_nemo.config.schema import RunConfig, to_dict
from asft_nemo.errors import UserError

logger = logging.getLogger(__name__)


def launch(run: RunConfig) -> None:
    """Checks the inputs, opens the run's folder and trains on `run.run.world_size` ranks of this machine.

    Raises:
        UserError: what the user can mend, found here or by a rank.
        RuntimeError: a rank failed otherwise; its output is on stderr.
    """
    launch_many([run])


def launch_cache(run: RunConfig, *, repair: bool) -> None:
    """Writes the hidden-state cache of a training run on `run.run.world_size` ranks of this machine.

    Raises: as `launch`.
    """
    from asft_nemo.data import prepare
    from asft_nemo.model import check_trainable, read_model_spec
    from asft_nemo.run_dir import base_checkpoint, hf_dir

    require_fp8(run)
    check_trainable(read_model_spec(hf_dir(run)))
    logger.info("%s", prepare(run, tokenizer_dir=hf_dir(run)).summary)
    base_checkpoint(run)
    _start([{"job": "repair" if repair else "cache", "config": to_dict(run)}], run.run.world_size)


def launch_logits(run: RunConfig, *, weights_dir: Path, tokens_file: Path, out_file: Path) -> None:
    """Writes a checkpoint's logits on `run.run.world_size` ranks of this machine; arguments as `asft_nemo.train.write_logits`.

    Raises: as `launch`.
    """
    files = {"weights_dir": str(weights_dir), "tokens_file": str(tokens_file), "out_file": str(out_file)}
    _start([{"job": "logits", "config": to_dict(run), "files": files}], run.run.world_size)


def launch_many(runs: Sequence[RunConfig]) -> None:
    """Does several runs, one after another, in one group of ranks (importing NeMo takes 10 s a rank, so it is paid once).

    All runs must ask for the same number of ranks. Raises as `launch`.
    """
    sizes = {run.run.world_size for run in runs}
    if len(sizes) != 1:
        raise ValueError(f"runs of one group need one world_size, got {sorted(sizes)}")
    with ExitStack() as held:
        runs = [run for run in runs if _prepare(run, held)]
        if runs:
            _start([{"job": "train", "config": to_dict(run)} for run in runs], sizes.pop())


def _start(work: list[dict[str, object]], world_size: int) -> None:
    """Runs the jobs one after another in one group of ranks and waits."""
    with tempfile.TemporaryDirectory(prefix="asft-") as scratch:
        jobs, error = Path(scratch) / "runs.json", Path(scratch) / "error.json"
        jobs.write_text(json.dumps(work))
        command = [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={world_size}",
            ),
            *("-m", "asft_nemo.ranks", str(jobs)),
        ]
        code = subprocess.run(command, env=_environment(error, world_size)).returncode
        if error.exists():
            raise UserError(json.loads(error.read_text())["message"])
        if code:
            raise RuntimeError(f"the training ranks stopped with exit code {code}; their messages are above")


def _prepare(run: RunConfig, held: ExitStack) -> bool:
    """What one process can check and do before ranks start, so that bad input costs seconds and leaves nothing behind.

    Args:
        run: the settings.
        held: keeps the run folder's lock until the ranks have ended.

    Returns:
        Whether anything is left to train: a finished run that is resumed has nothing to do.
    """
    from asft_nemo.data import prepare
    from asft_nemo.model import check_trainable, read_model_spec
    from asft_nemo.reference.cache_store import read_manifest
    from asft_nemo.run_dir import (
        base_checkpoint,
        cache_dir,
        check_initial_adapters,
        hf_dir,
        initial_adapters,
        open_run_dir,
        refuse_busy,
        resume_from,
    )

    refuse_busy(run)
    check_trainable(read_model_spec(hf_dir(run)))
    if resume_from(run) is None:
        check_initial_adapters(run)
    prepared = prepare(run, tokenizer_dir=hf_dir(run))
    logger.info("%s", prepared.summary)
    held.callback(open_run_dir(run, data_fingerprint=prepared.fingerprint).release)
    latest = resume_from(run)
    if latest is not None and latest.name == f"step_{prepared.max_steps}":
        logger.info("%s is finished: step %d of %d", run.run.dir, prepared.max_steps, prepared.max_steps)
        return False
    base_dir = base_checkpoint(run)
    if latest is None:
        initial_adapters(run, base_dir)
    if run.reference.form == "cached" and run.reference.fill == "job":
        read_manifest(cache_dir(run))  # the ranks check the rest: a missing cache need not wait for them
    return True


def _environment(error: Path, world_size: int) -> dict[str, str]:
    # a quarter of the cores, as long as all ranks together have no more threads than there are cores
    threads = max(1, (os.cpu_count() or 1) // max(4, world_size))
    return {
        **os.environ,
        "ASFT_ERROR_FILE": str(error),
        "ASFT_LAUNCHER_PID": str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "PYTHONWARNINGS": os.environ.get(
            "PYTHONWARNINGS", "ignore"
        ),  # also of the helper processes that write checkpoints
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
