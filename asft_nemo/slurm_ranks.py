"""One rank of a job that `asft launch` submitted: `asft train` in a task of srun is that task's rank instead of starting ranks."""

from __future__ import annotations

import functools
import logging
import os
import traceback
from collections.abc import Mapping
from typing import NoReturn

from asft_nemo import stop_signal
from asft_nemo.config.schema import RunConfig
from asft_nemo.errors import ConfigError, UserError, full_gpu, mendable
from asft_nemo.logs import set_up_logging

logger = logging.getLogger(__name__)

#: what torchrun sets, from what Slurm's tasks have
_VARIABLES = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
    "GROUP_RANK": "SLURM_NODEID",
    "TORCHELASTIC_RUN_ID": "SLURM_JOB_ID",  # Lightning then takes torchrun's variables, not Slurm's with its own signal handlers
}
_OTHERS_WAIT = (
    5.0  # seconds: most errors are every rank's, and rank 0 says them; srun ends the others when it has
)


def here() -> bool:
    """Whether this process is a rank that a launched job started."""
    return "ASFT_SLURM_RANKS" in os.environ


def run_rank(run: RunConfig, job: str) -> NoReturn:
    """Does a job as this rank, and ends the process: other ranks may wait in a collective for one that has failed.

    Args:
        run: the settings.
        job: ``train``, ``cache`` or ``repair``.
    """
    from asft_nemo.ranks import USER_ERROR_EXIT, leave
    from asft_nemo.run_dir import leave_run_dir

    try:
        _enter()
        stop_signal.listen(at_once=None if job == "train" else functools.partial(_leave_cache, run))
        set_up_logging(rank=int(os.environ["RANK"]))
        # Composing needs Hydra, which `asft --help` does without, and vLLM's image has not.
        from asft_nemo.launching.settings import refuse_other_settings

        refuse_other_settings(run)
        _do(run, job)
    except stop_signal.Stopped as stopped:
        logger.info("stopped as asked, behind %s", stopped)
        leave_run_dir()
        leave(0)
    except UserError as error:
        _say(str(error))
        leave(USER_ERROR_EXIT)
    except Exception as error:
        if isinstance(error, OSError) and (told := mendable(error)) is not None:
            _say(str(told))
            leave(USER_ERROR_EXIT)
        if job != "train":
            # The collective may have failed because another rank left as asked: this one hears the same in a moment, and leaves like it.
            stop_signal.heard(within=_OTHERS_WAIT)
        _say(f"rank {os.environ.get('RANK')} failed:\n{traceback.format_exc()}")
        if (told := full_gpu(error, job=job)) is not None:
            _say(str(told))
            leave(USER_ERROR_EXIT)
        leave(1)
    leave_run_dir()
    leave(0)


def _enter() -> None:
    """Puts torchrun's variables in place.

    Raises:
        ConfigError: this is no task of such a job.
    """
    missing = [
        name for name in (*_VARIABLES.values(), "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise ConfigError(
            f"ASFT_SLURM_RANKS is set, but not {', '.join(missing)}: start the script by srun inside its batch script, or unset ASFT_SLURM_RANKS"
        )
    os.environ.update({ours: os.environ[theirs] for ours, theirs in _VARIABLES.items()})
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(_cores(os.environ, bound=len(os.sched_getaffinity(0)))),
        "PYTHONWARNINGS": "ignore",  # also of the helper processes that write checkpoints
    }.items():
        os.environ.setdefault(name, value)


def _cores(variables: Mapping[str, str], *, bound: int) -> int:
    """Cores that this rank may use: what the job asked for each, or what it is bound to where others are bound elsewhere, or its share.

    Args:
        variables: Slurm's and torchrun's.
        bound: cores that this process may run on.
    """
    asked = int(variables.get("SLURM_CPUS_PER_TASK", 0))
    if asked:
        return max(1, min(asked, bound))
    on_node = variables.get("SLURM_CPUS_ON_NODE")
    shared = on_node is None or bound >= int(on_node)
    return max(1, bound // int(variables["LOCAL_WORLD_SIZE"]) if shared else bound)


def _do(run: RunConfig, job: str) -> None:
    from asft_nemo.train import cache_reference

    if job == "train":
        _train(run)
    else:
        cache_reference(run, repair=job == "repair")


def _leave_cache(run: RunConfig) -> None:
    """A cache may be left at any moment: what is whole in it is not computed again. The word that is left says whether it grew."""
    from asft_nemo.ranks import leave
    from asft_nemo.run_dir import cache_dir

    whole = len(list(cache_dir(run).glob("rows-*.safetensors")))
    stop_signal.say_stopped(f"{whole} whole files of the cache")
    leave(0)


def _train(run: RunConfig) -> None:
    """Trains what is left: a job that came back may find that nothing is. The data are prepared once, which takes minutes where they are large."""
    from asft_nemo.data import prepare
    from asft_nemo.run_dir import hf_dir, resume_from
    from asft_nemo.train import train

    latest, data = resume_from(run), None
    if latest is not None:
        data = prepare(run, tokenizer_dir=hf_dir(run))
        if latest.name == f"step_{data.max_steps}":
            logger.info("%s is finished: step %d of %d", run.run.dir, data.max_steps, data.max_steps)
            return
    train(run, data=data)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0" or not stop_signal.heard(within=_OTHERS_WAIT):
        logger.error("%s", text)
