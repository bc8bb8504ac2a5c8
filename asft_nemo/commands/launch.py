"""asft launch, status, logs and cancel: a run as jobs of a cluster, or one stage after another on this machine."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asft_nemo.commands.output import BUG, DONE, Add, answer
from asft_nemo.errors import ConfigError, UserError

if TYPE_CHECKING:
    from asft_nemo.config.schema import RunConfig
    from asft_nemo.launching.jobs import Place, Rendered
    from asft_nemo.launching.record import Job, Record
    from asft_nemo.launching.slurm import JobState
    from asft_nemo.launching.stages import Launch, Stage
    from asft_nemo.planner.plan import Plan

_FOLLOW_SECONDS = 2.0


def add_launch(add: Add) -> None:
    """Adds the commands."""
    launch = add("launch", _launch, "a whole run through NeMo-Run: on Slurm, or here one stage after another")
    launch.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings, for example experiment=... cluster=slurm"
    )
    launch.add_argument("--stages", metavar="A,B", help="only these (default: all that apply)")
    launch.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan and every script; nothing is submitted or looked for",
    )
    launch.add_argument(
        "--force", action="store_true", help="launch although training does not fit the GPUs, by asft plan"
    )
    status = add("status", _status, "what became of the jobs of a launched run")
    logs = add("logs", _logs, "what a stage of a launched run wrote")
    cancel = add("cancel", _cancel, "cancel the jobs of a launched run that wait or run")
    for command in (status, logs, cancel):
        command.add_argument("run_dir", type=Path, metavar="RUN", help="the run's folder, run.dir")
    logs.add_argument(
        "stage", nargs="?", metavar="STAGE", help="default: the one that failed, else the latest that began"
    )
    logs.add_argument("--all", action="store_true", help="of all attempts, not of the latest alone")
    logs.add_argument("--follow", action="store_true", help="go on until the job has ended")


def _launch(arguments: argparse.Namespace) -> int:
    from asft_nemo.config.load import compose
    from asft_nemo.launching.fit import published_shape
    from asft_nemo.launching.jobs import Place
    from asft_nemo.launching.words import for_nodes

    run = compose(
        arguments.overrides,
        check_inputs=not arguments.dry_run,
        launched=True,
        shape_of=published_shape if arguments.dry_run else None,
    )
    run = for_nodes(run)
    place = Place.of(Path(run.run.dir).absolute())
    launch, stages, idle = _stages(run, arguments, place)
    if any(stage.name == "eval" for stage in stages):
        from asft_nemo.launching.eval_check import check_evaluation

        check_evaluation(run, look_for_files=not arguments.dry_run)
    plan = _training_plan(run, stages, force=arguments.force)
    if arguments.dry_run:
        return _dry_run(arguments, launch, stages, idle, plan)
    return _submit(arguments, launch, stages, place, words="\n".join(_plan(run, stages, idle, plan)))


def _training_plan(run: RunConfig, stages: Sequence[Stage], *, force: bool) -> Plan | None:
    """The plan of the training, where it is among the stages and has GPUs to be planned for.

    Raises:
        ConfigError: it does not fit them.
    """
    from asft_nemo.launching.fit import refuse_too_large, training_plan

    plan = training_plan(run) if any(stage.name == "train" for stage in stages) else None
    if plan is not None and not force:
        refuse_too_large(plan)
    return plan


def _stages(
    run: RunConfig, arguments: argparse.Namespace, place: Place
) -> tuple[Launch, list[Stage], dict[str, str]]:
    from asft_nemo.launching.prepared import is_prepared
    from asft_nemo.launching.stages import Launch, build, choose

    asked = None if arguments.stages is None else [name for name in arguments.stages.split(",") if name]
    names, idle = choose(run, asked)
    if not names:
        raise UserError("--stages names no stage: leave it out for all")
    launch = Launch(
        run=run,
        asft=_asft(run),
        folder=place.folder,
        prepared="prepare" in names or is_prepared(run, place.folder),
    )
    return launch, build(launch, names), idle


def _asft(run: RunConfig) -> tuple[str, ...]:
    if run.cluster.asft is not None:
        program, *rest = shlex.split(run.cluster.asft)
        return (str(Path(program).absolute()) if "/" in program else program, *rest)
    return ("asft",) if run.cluster.container_image else (sys.executable, "-m", "asft_nemo")


def _dry_run(
    arguments: argparse.Namespace,
    launch: Launch,
    stages: Sequence[Stage],
    idle: dict[str, str],
    plan: Plan | None,
) -> int:
    from asft_nemo.config.schema import plain
    from asft_nemo.launching.fit import as_json, warnings
    from asft_nemo.launching.jobs import Place, render
    from asft_nemo.launching.settings import given
    from asft_nemo.launching.stages import settings_of_ranks
    from asft_nemo.launching.words import setting

    run, place = launch.run, Place.of(launch.folder)
    settings = given(settings_of_ranks(launch))
    with tempfile.TemporaryDirectory(prefix="asft-") as scratch:
        drawn = render(run, stages, Place(place.folder, place.start, Path(scratch)), experiment="asft_0")
        scripts = {name: _named(one, scratch, str(place.home)) for name, one in drawn.items()}
    values = {
        "run_dir": str(place.folder),
        "stages": [
            {"name": stage.name, "after": list(stage.after), **scripts[stage.name]} for stage in stages
        ],
        "left_out": idle,
        "settings": {key: plain(value) for key, value in settings.items()},
        "training": None if plan is None else as_json(plan),
        "warnings": warnings(run, plan),
    }
    lines = [*_plan(run, stages, idle, plan), ""]
    lines += [
        "===== settings of the ranks, all others have their defaults =====",
        *map(setting, settings, settings.values()),
        "",
    ]
    for stage in stages:
        for kind, text in scripts[stage.name].items():
            if text is not None:
                lines += [f"===== {stage.name}: {kind.replace('_', ' ')} =====", text]
    answer(arguments, values, "\n".join(lines))
    return DONE


def _named(drawn: Rendered, scratch: str, home: str) -> dict[str, str | None]:
    """The scripts with the run's own folder for the one they were drawn in."""
    texts = {"script": drawn.script, "batch_script": drawn.batch}
    return {kind: None if text is None else text.replace(scratch, home) for kind, text in texts.items()}


def _plan(run: RunConfig, stages: Sequence[Stage], idle: dict[str, str], plan: Plan | None) -> list[str]:
    from asft_nemo.config.cluster_rules import nodes, on_slurm, ranks_per_node
    from asft_nemo.launching.eval_gpus import eval_gpus
    from asft_nemo.launching.fit import in_words, warnings

    where = f"cluster={run.cluster.name}" if on_slurm(run) else "this machine"
    lines = [f"{len(stages)} stages on {where}; everything is written to {run.run.dir}"]
    for stage in stages:
        size = "1 process"
        if stage.gpus and not stage.ranks and on_slurm(run) and run.cluster.request_gpus:
            size += f" with {eval_gpus(run)} of {run.cluster.gpus_per_node} GPUs"
        if stage.ranks:
            size = (
                f"{nodes(run)} nodes x {ranks_per_node(run)} ranks"
                if on_slurm(run)
                else f"{run.run.world_size} ranks"
            )
        after = f", after {' and '.join(stage.after)}" if stage.after else ""
        lines.append(f"  {stage.name:<16}{size}{after}")
    lines += [f"  {name:<16}left out: {why}" for name, why in idle.items()]
    lines += [] if plan is None else [in_words(plan)]
    return lines + [f"warning: {text}" for text in warnings(run, plan)]


def _submit(
    arguments: argparse.Namespace, launch: Launch, stages: Sequence[Stage], place: Place, *, words: str
) -> int:
    from asft_nemo.config.cluster_rules import on_slurm
    from asft_nemo.launching import record, scripts, slurm
    from asft_nemo.launching.jobs import experiment_name, submit
    from asft_nemo.launching.settings import write_settings
    from asft_nemo.launching.stages import settings_of_ranks

    run, name = launch.run, experiment_name()
    if on_slurm(run):
        slurm.check_cluster(run.cluster)
    with record.claim(place.folder):
        _refuse_running(place.folder)
        for stage in stages:
            scripts.done_file(place.folder, stage.name).unlink(missing_ok=True)
        if on_slurm(run):
            _ask_slurm(run, stages, place, name)
        print(words, file=sys.stderr)
        if any(stage.ranks for stage in stages):
            write_settings(place.folder, settings_of_ranks(launch), words=arguments.overrides)
        launched = submit(run, stages, place, experiment=name)
        launched.write(place.folder)
    if not on_slurm(run):
        return _ended(arguments, launched, place)
    jobs = {job.stage: job.job_id for job in launched.jobs}
    listed = ", ".join(f"{stage} {job_id}" for stage, job_id in jobs.items())
    answer(
        arguments,
        {"run_dir": str(place.folder), "experiment": name, "jobs": jobs},
        f"submitted: {listed}\nto watch: asft status {run.run.dir}, asft logs {run.run.dir} [STAGE]; to stop: asft cancel {run.run.dir}",
    )
    return DONE


def _ask_slurm(run: RunConfig, stages: Sequence[Stage], place: Place, name: str) -> None:
    """Asks Slurm whether it would take every job.

    Raises:
        UserError: it refuses one.
    """
    from asft_nemo.launching import slurm
    from asft_nemo.launching.jobs import forget, render

    try:
        for drawn in render(run, stages, place, experiment=name).values():
            if drawn.batch_file is not None:
                slurm.test_only(drawn.batch_file)
    finally:
        forget(place, name)


def _refuse_running(folder: Path) -> None:
    """Two launches of one run would train in one folder.

    Raises:
        ConfigError: jobs of an earlier launch wait or run.
    """
    from asft_nemo.launching import record, slurm

    if not (folder / record.RECORD).exists():
        return
    before = record.read(folder)
    if before.executor != "slurm":
        return
    alive = [
        job_id for job_id, state in slurm.states([job.job_id for job in before.jobs]).items() if state.alive
    ]
    if alive:
        raise ConfigError(
            f"run.dir={folder} belongs to jobs that wait or run ({', '.join(alive)}): wait for them, stop them with asft cancel {folder}, or "
            "choose another run.dir"
        )


def _ended(arguments: argparse.Namespace, record: Record, place: Place) -> int:
    """What became of stages that ran here."""
    states = _states(record, place.folder)
    failed = [stage for stage, state in states.items() if state.state != "COMPLETED"]
    words = f"done: everything is in {place.folder}"
    if failed:
        words = f"stage {failed[0]} failed: see asft logs {place.folder} {failed[0]}"
    answer(arguments, {"run_dir": str(place.folder), "failed": failed}, words)
    return BUG if failed else DONE


def _states(record: Record, folder: Path) -> dict[str, JobState]:
    """State by stage."""
    from asft_nemo.launching import slurm
    from asft_nemo.launching.scripts import done_file

    if record.executor == "slurm":
        found = slurm.states([job.job_id for job in record.jobs])
        return {job.stage: found[job.job_id] for job in record.jobs}
    return {
        job.stage: slurm.JobState("COMPLETED" if done_file(folder, job.stage).exists() else "FAILED")
        for job in record.jobs
    }


def _status(arguments: argparse.Namespace) -> int:
    from asft_nemo.launching import record

    found = record.read(arguments.run_dir)
    states = _states(found, arguments.run_dir)
    values: list[dict[str, Any]] = []
    lines = []
    for job in found.jobs:
        state = states[job.stage]
        log = str(job.log_files()[-1]) if state.failed and job.log_files() else None
        values.append({"stage": job.stage, "job_id": job.job_id, **vars(state), "log": log})
        about = [state.elapsed, state.nodes, state.reason, f"see {log}" if log else ""]
        lines.append(
            f"{job.stage:<16}{job.job_id:<12} {state.state:<12}{'  '.join(text for text in about if text)}".rstrip()
        )
    answer(arguments, {"run_dir": str(arguments.run_dir), "stages": values}, "\n".join(lines))
    return DONE


def _logs(arguments: argparse.Namespace) -> int:
    from asft_nemo.launching import record

    found = record.read(arguments.run_dir)
    job = found.job(arguments.stage) if arguments.stage else _interesting(found, arguments.run_dir)
    files = job.log_files() if arguments.all else job.log_files()[-1:]
    if not files:
        raise UserError(f"stage {job.stage} has written nothing yet: see asft status {arguments.run_dir}")
    if arguments.json:
        answer(arguments, {"stage": job.stage, "files": [str(file) for file in files]}, "")
        return DONE
    for file in files:
        print(f"==> {file} <==", file=sys.stderr)
        _show(file, 0)
    if arguments.follow:
        _follow(arguments, job, files[-1])
    return DONE


def _interesting(record: Record, folder: Path) -> Job:
    """The stage that failed, else the latest that wrote something."""
    states = _states(record, folder)
    written = [job for job in record.jobs if job.log_files()]
    failed = [job for job in written if states[job.stage].failed]
    if not written:
        raise UserError(f"no stage has written anything yet: see asft status {folder}")
    return failed[0] if failed else written[-1]


def _show(file: Path, start: int) -> int:
    with file.open("rb") as text:
        text.seek(start)
        sys.stdout.write(text.read().decode(errors="replace"))
        sys.stdout.flush()
        return text.tell()


def _follow(arguments: argparse.Namespace, job: Job, file: Path) -> None:
    from asft_nemo.launching import record

    end = file.stat().st_size
    while _states(record.read(arguments.run_dir), arguments.run_dir)[job.stage].alive:
        time.sleep(_FOLLOW_SECONDS)
        newest = job.log_files()[-1]
        file, end = (newest, 0) if newest != file else (file, end)  # it came back from the queue
        end = _show(file, end)
    _show(file, end)


def _cancel(arguments: argparse.Namespace) -> int:
    from asft_nemo.launching import record, slurm

    found = record.read(arguments.run_dir)
    if found.executor != "slurm":
        raise UserError(
            f"{arguments.run_dir} ran on this machine: stop the asft launch that runs it with Ctrl-C"
        )
    states = _states(found, arguments.run_dir)
    alive = {job.stage: job.job_id for job in found.jobs if states[job.stage].alive}
    if alive:
        slurm.cancel(list(alive.values()))
    listed = ", ".join(f"{stage} {job_id}" for stage, job_id in alive.items())
    answer(
        arguments,
        {"run_dir": str(arguments.run_dir), "cancelled": alive},
        f"cancelled: {listed}" if alive else "nothing to cancel: no job of this run waits or runs",
    )
    return DONE
