"""The shell text of a stage: what its node runs, and what the batch script around it does about signals and restarts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from asft_nemo.config.schema import ClusterConfig
from asft_nemo.launching.stages import Stage

#: of a job that stopped for a signal and may not come back; sysexits.h's "try again later"
STOPPED_EXIT = 75
#: of srun when SIGTERM ended its task: what a preemption with a grace time does to a stage without ranks
TERMINATED = 143


def stop_file(folder: Path) -> str:
    """Where training says, in shell words, that it stopped for a signal behind a complete checkpoint: one name per attempt."""
    return f"{shlex.quote(str(folder / 'launch'))}/stopped-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"


def stage_script(
    stage: Stage, cluster: ClusterConfig, *, folder: Path, variables: Mapping[str, Path] | None = None
) -> str:
    """What a node runs for a stage, once or once for each rank.

    Args:
        stage: the stage.
        cluster: where.
        folder: run.dir, absolute: the one directory that every node is known to have.
        variables: folders to export by these names.
    """
    lines = [f"# Stage {stage.name} of {folder}, made by asft launch.", "set -euo pipefail"]
    if cluster.executor == "slurm" and stage.ranks:
        lines += [
            "# A signal to stop must not end a rank that does not listen yet; the others hear it, or Slurm ends the job at its time.",
            "trap '' USR1 TERM",
            "# One rank: its number and where rank 0 is come from Slurm's variables.",
            "export ASFT_SLURM_RANKS=1",
            f"export ASFT_STOP_FILE={stop_file(folder)}",
        ]
    lines += [f"cd {shlex.quote(str(folder))}", *_exports(cluster, variables or {}), *_setup(cluster)]
    if cluster.executor == "local":
        return "\n".join([*lines, *_local(stage, folder)]) + "\n"
    return "\n".join([*lines, *stage.lines]) + "\n"


def _exports(cluster: ClusterConfig, variables: Mapping[str, Path]) -> list[str]:
    listed = {name: value for name, _, value in (entry.partition("=") for entry in cluster.env)}
    pairs = {name: str(folder) for name, folder in variables.items()} | listed
    return [f"export {name}={shlex.quote(value)}" for name, value in pairs.items()]


def _setup(cluster: ClusterConfig) -> Sequence[str]:
    """Lines of the cluster's own. What they source seldom bears `-u`; one that fails ends the stage all the same."""
    return ("set +u", *cluster.setup, "set -u") if cluster.setup else ()


def done_file(folder: Path, stage: str) -> Path:
    """What says, on this machine, that a stage of the current launch succeeded."""
    return folder / "launch" / f"{stage}.done"


def _local(stage: Stage, folder: Path) -> list[str]:
    """Here nobody but the script itself looks whether the stages before it succeeded."""
    waits = []
    for name in stage.after:
        done = shlex.quote(str(done_file(folder, name)))
        waits.append(
            f"[ -e {done} ] || {{ echo 'asft: stage {name} has not succeeded, so {stage.name} is not run' >&2; exit 3; }}"
        )
    lines = [line.removeprefix("exec ") for line in stage.lines]  # something comes behind it
    return [*waits, *lines, f"touch {shlex.quote(str(done_file(folder, stage.name)))}"]


def batch_setup(stage: Stage, cluster: ClusterConfig, *, folder: Path, log: str) -> str:
    """Lines of the batch script ahead of srun.

    srun waits in the foreground, so this shell cannot act on a signal while ranks run: Slurm signals the ranks themselves (`--signal`
    without `B:`), they leave a file behind a complete checkpoint, and the shell looks for it when it ends. A job that was cancelled is
    no longer RUNNING then, and one that succeeded or failed has left no file: neither comes back. A stage without ranks knows no checkpoint;
    what Slurm's notice of a preemption ended is done again.

    Args:
        stage: the stage.
        cluster: where.
        folder: run.dir, absolute.
        log: the log of the stage's own output, with Slurm's variables as a shell reads them.
    """
    lines = [
        "set +vx",
        f"log={log}",
        "trap : USR1 TERM  # meant for the ranks; this shell stays to see how they end",
        *_back(cluster),
        "asft_end() {",
        "  code=$?",
        *(_stopped(folder) if stage.ranks else ()),
        f'  if [ "$code" -eq {TERMINATED} ] && scontrol show job "$SLURM_JOB_ID" | grep -q "PreemptTime=[0-9]"; then',
        "    asft_back preempted",
        "  fi",
        '  if [ "$code" -ne 0 ]; then',
        f'    echo "asft: stage {stage.name} failed with exit code $code: see $log" >&2',
        "  fi",
        '  exit "$code"',
        "}",
        "trap asft_end EXIT",
        f'if [ "${{SLURM_RESTART_COUNT:-0}}" -gt {cluster.max_requeues} ]; then',
        f'  echo "asft: this job was started again more than cluster.max_requeues={cluster.max_requeues} times" >&2',
        "  exit 1",
        "fi",
    ]
    return "\n".join([*lines, *(_rendezvous() if stage.ranks else ())])


def _back(cluster: ClusterConfig) -> Sequence[str]:
    """Puts the job back into the queue, or says why not."""
    return (
        "asft_back() {",
        '  state=$(squeue --noheader --job "$SLURM_JOB_ID" --format %T)',
        '  if [ "$state" != RUNNING ]; then',
        '    why="Slurm calls it ${state:-gone}"  # cancelled, or requeued by Slurm itself',
        f'  elif [ "${{SLURM_RESTART_COUNT:-0}}" -ge {cluster.max_requeues} ]; then',
        f'    why="it came back cluster.max_requeues={cluster.max_requeues} times"',
        "  else",
        '    echo "asft: $1; the job goes back to the queue"',
        '    scontrol requeue "$SLURM_JOB_ID" && exit 0',
        '    why="scontrol requeue failed"',
        "  fi",
        '  echo "asft: $1, and the job is not put back into the queue: $why" >&2',
        "}",
    )


def _stopped(folder: Path) -> Sequence[str]:
    """A job that stopped behind the same point three times over, so that two attempts came to nothing, would do so until its last requeue."""
    before = shlex.quote(str(folder / "launch"))
    return (
        f"  stopped={stop_file(folder)}",
        '  if [ "$code" -eq 0 ] && [ -e "$stopped" ]; then',
        f"    code={STOPPED_EXIT}",
        '    point=$(cat "$stopped") attempts=1',
        "    for ago in 1 2; do",
        f'      [ "$(cat {before}/stopped-"$SLURM_JOB_ID-$((${{SLURM_RESTART_COUNT:-0}} - ago))" 2> /dev/null)" = "$point" ] || break',
        "      attempts=$((attempts + 1))",
        "    done",
        '    if [ "$attempts" -eq 3 ]; then',
        '      echo "asft: stopped behind $point like the two attempts before, so the job is not put back into the queue: raise cluster.time" >&2',
        "    else",
        '      asft_back "stopped behind $point"',
        "    fi",
        "  fi",
    )


def _rendezvous() -> Sequence[str]:
    return (
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "# A node's name that no resolver knows has an address in Slurm.",
        'getent hosts "$MASTER_ADDR" > /dev/null ||',
        "  MASTER_ADDR=$(scontrol show node \"$MASTER_ADDR\" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')",
        "MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))  # below the ports that Linux hands out by itself",
        "export MASTER_ADDR MASTER_PORT",
    )
