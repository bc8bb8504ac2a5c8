"""Stages as jobs of NeMo-Run: one experiment, one job a stage, on Slurm or one after another on this machine.

NEMORUN_HOME is `run.dir/launch`, so that scripts and logs of a run are in its folder; NeMo-Run reads it when it is imported, which is why
`submit` and `render` import it themselves. Nothing here imports NeMo or torch: a login node need not have them working.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asft_nemo.config.cluster_rules import nodes, on_slurm, ranks_per_node
from asft_nemo.config.mounts import image, mounts, variables
from asft_nemo.config.schema import ClusterConfig, RunConfig
from asft_nemo.errors import ConfigError
from asft_nemo.launching.eval_gpus import eval_gpus
from asft_nemo.launching.record import Job, Record
from asft_nemo.launching.scripts import batch_setup, stage_script
from asft_nemo.launching.stages import Stage

_TITLE = "asft"
_NAME_LENGTH = 40  # of a run, in a job's name


@dataclass(frozen=True)
class Place:
    """Where a launch writes and from where it was called.

    Attributes:
        folder: run.dir, absolute.
        start: the directory `asft launch` was called in.
        home: NeMo-Run's own folder: `launch` in run.dir, or a scratch folder where nothing is submitted.
    """

    folder: Path
    start: Path
    home: Path

    @staticmethod
    def of(folder: Path) -> Place:
        """That of a run, called from here."""
        return Place(folder, Path.cwd(), folder / "launch")


@dataclass(frozen=True)
class Rendered:
    """A stage's scripts.

    Attributes:
        script: what the node runs.
        batch: what sbatch gets; None on this machine.
        batch_file: where it is.
    """

    script: str
    batch: str | None
    batch_file: Path | None


def render(run: RunConfig, stages: Sequence[Stage], place: Place, *, experiment: str) -> dict[str, Rendered]:
    """Every script of a launch by stage, left in the experiment's folder. Asks nobody: neither Slurm nor the nodes' files are needed."""
    with _experiment(run, stages, place, experiment) as exp:
        exp.dryrun(log=False, exist_ok=True, delete_exp_dir=False)
        return {stage.name: _rendered(Path(exp._exp_dir), stage) for stage in stages}


def submit(run: RunConfig, stages: Sequence[Stage], place: Place, *, experiment: str) -> Record:
    """Hands every stage over: on Slurm they are all in the queue when it returns, on this machine they have ended."""
    (place.home / "experiments").mkdir(parents=True, exist_ok=True)
    make_cache(run)
    with _experiment(run, stages, place, experiment) as exp:
        exp.run(detach=on_slurm(run), tail_logs=not on_slurm(run))
        if not on_slurm(run) and len(stages) == 1:
            exp._wait_for_jobs(
                jobs=exp.jobs
            )  # what leaving the experiment does, but we look at the jobs before
        folder = Path(exp._exp_dir)
        jobs = [_job(stage, job.handle, folder) for stage, job in zip(stages, exp.jobs, strict=True)]
        return Record(experiment, run.cluster.executor, run.cluster.name, tuple(jobs))


def make_cache(run: RunConfig) -> None:
    """Makes the folder of the reference's cache: a container cannot mount one that is not there.

    Raises:
        ConfigError: it cannot be made.
    """
    folder = run.reference.cache_dir
    try:
        if folder is not None and on_slurm(run):
            Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"reference.cache_dir={folder} cannot be made ({error.strerror}): set it to a folder on a file system that all nodes share"
        ) from None


def experiment_name() -> str:
    """A name that no other launch has."""
    return f"{_TITLE}_{time.time_ns()}"


@contextlib.contextmanager
def _experiment(run: RunConfig, stages: Sequence[Stage], place: Place, name: str) -> Iterator[Any]:
    """The experiment with its jobs; NeMo-Run's own words are kept from the terminal."""
    os.environ["NEMORUN_HOME"] = str(place.home)
    import nemo_run

    for logger in ("nemo_run", "torchx"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    exp = nemo_run.Experiment(
        _TITLE,
        id=name,
        base_dir=str(place.home),
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
        serialize_metadata_for_scripts=False,
        threadpool_workers=1,
        log_level="ERROR",
    )
    with _left_alone(silent=on_slurm(run)), exp:
        for stage in stages:
            script = stage_script(stage, run.cluster, folder=place.folder, variables=variables(run))
            executor = _slurm(run, stage, place, name) if on_slurm(run) else nemo_run.LocalExecutor()
            exp.add(
                nemo_run.Script(inline=script),
                executor=executor,
                name=stage.name,
                dependencies=list(stage.after),
            )
        yield exp


@contextlib.contextmanager
def _left_alone(*, silent: bool) -> Iterator[None]:
    """NeMo-Run's helpers read the terminal, which would stop a command in the background; and print what they do."""
    before = sys.stdin
    with open(os.devnull) as nothing, contextlib.ExitStack() as stack:
        sys.stdin = nothing
        stack.callback(setattr, sys, "stdin", before)
        if silent:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


def _slurm(run: RunConfig, stage: Stage, place: Place, experiment: str) -> Any:
    """NeMo-Run's executor for one stage; ranks are one task for each GPU."""
    import nemo_run

    cluster = run.cluster
    many, each = (nodes(run), ranks_per_node(run)) if stage.ranks else (1, 1)
    elsewhere = not stage.gpus and cluster.cpu_partition not in (None, cluster.partition)
    prefix = f"{place.folder.name[:_NAME_LENGTH]}."  # NeMo-Run reads a job's stage behind the last dot
    jobs = place.home / "experiments"
    log = (
        jobs
        / _TITLE
        / experiment
        / stage.name
        / f"log-{prefix}{stage.name}_${{SLURM_JOB_ID}}_${{SLURM_RESTART_COUNT:-0}}.out"
    )
    gpus = (
        (ranks_per_node(run) if stage.ranks else eval_gpus(run))
        if stage.gpus and cluster.request_gpus
        else None
    )
    # srun does not take over what sbatch was told of it.
    cores = [] if cluster.cpus_per_task is None else [f"--cpus-per-task={cluster.cpus_per_task}"]
    return nemo_run.SlurmExecutor(
        account=str(cluster.account),
        partition=cluster.cpu_partition if elsewhere else cluster.partition,
        # Both are words of the GPUs' partition: sbatch would refuse what asks another one for an h100.
        qos=None if elsewhere else cluster.qos,
        constraint=None if elsewhere else cluster.constraint,
        time=cluster.time,
        nodes=many,
        ntasks_per_node=each,
        gpus_per_node=gpus,
        cpus_per_task=cluster.cpus_per_task,
        mem=cluster.mem,
        exclusive=True if cluster.exclusive and stage.ranks else None,
        signal=f"USR1@{cluster.signal_seconds}" if stage.ranks else None,
        container_image=image(_image_of(stage, cluster), place.start),
        container_mounts=mounts(run) if cluster.container_image else [],
        srun_args=[*cores, *map(shlex.quote, cluster.srun_args)],  # NeMo-Run writes them as they are
        additional_parameters=_parameters(cluster.sbatch_args),
        job_name_prefix=prefix,
        setup_lines=batch_setup(stage, cluster, folder=place.folder, log=f'"{log}"'),
        # nothing is packed: the nodes see this installation, or the image has one
        packager=nemo_run.Packager(),
        tunnel=nemo_run.LocalTunnel(job_dir=str(jobs)),
        poll_estimated_start_time=False,
    )


def _image_of(stage: Stage, cluster: ClusterConfig) -> str | None:
    """What evaluates may need another base than what trains: the Dockerfile has a target of its own for it."""
    evaluates = stage.name in ("eval", "compare")
    return cluster.eval_image if evaluates and cluster.eval_image is not None else cluster.container_image


def _parameters(words: Sequence[str]) -> dict[str, Any]:
    """Further flags of sbatch. A job whose stage before it failed must not wait for ever."""
    pairs = [word.partition("=") for word in words]
    return {"kill_on_invalid_dep": "yes", **{name.replace("-", "_"): value for name, _, value in pairs}}


def _rendered(folder: Path, stage: Stage) -> Rendered:
    script = (folder / stage.name / "scripts" / f"{stage.name}.sh").read_text()
    batch = folder / f"{stage.name}_sbatch.sh"
    return Rendered(script, batch.read_text(), batch) if batch.exists() else Rendered(script, None, None)


def _job(stage: Stage, handle: str, folder: Path) -> Job:
    batch = folder / f"{stage.name}_sbatch.sh"
    return Job(
        stage=stage.name,
        job_id=handle.partition("://")[2].split("/")[1],
        after=stage.after,
        script=str(folder / stage.name / "scripts" / f"{stage.name}.sh"),
        batch_script=str(batch) if batch.exists() else None,
        logs=str(folder / stage.name),
    )


def forget(place: Place, experiment: str) -> None:
    """Removes what `render` left of an experiment that is not submitted."""
    shutil.rmtree(place.home / "experiments" / _TITLE / experiment, ignore_errors=True)
