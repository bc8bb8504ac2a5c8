"""Rules about the cluster, for `asft launch`: whoever trains on this machine is told of its secrets alone, for all settings are written down."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from asft_nemo.config.facts import Facts, Rule
from asft_nemo.config.mounts import unmountable
from asft_nemo.config.schema import ClusterConfig, RunConfig
from asft_nemo.config.slurm_flags import words_for_slurm

_TIME = re.compile(r"\d+|\d+:[0-5]?\d(:[0-5]?\d)?|\d+-\d+(:[0-5]?\d){0,2}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\n]*")
#: How variables that hold keys are called; one that names the file of a key is fine.
_SECRET = re.compile(
    r"(API_?KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|(^|_)(KEY|PAT|PASS)|_PWD)$"
)
_PASSWORD_OF_A_PLACE = re.compile(r"://[^/@\s]*:[^/@\s]+@")
_FOLDER = re.compile(r"[A-Za-z0-9_./,+@-]+")


def on_slurm(run: RunConfig) -> bool:
    """Whether the stages of a launched run become jobs of Slurm."""
    return run.cluster.executor == "slurm"


def nodes(run: RunConfig) -> int:
    """Nodes of a job with ranks: cluster.nodes, or as many as the ranks fill."""
    cluster = run.cluster
    return cluster.nodes or max(1, -(-run.run.world_size // cluster.gpus_per_node))


def ranks_per_node(run: RunConfig) -> int:
    """Ranks on each node; fewer than GPUs where a run has fewer ranks than one node has GPUs."""
    return (
        min(run.cluster.gpus_per_node, run.run.world_size) if nodes(run) == 1 else run.cluster.gpus_per_node
    )


def spread_tensor_groups(run: RunConfig) -> bool:
    """Whether tensor-parallel groups, which are consecutive ranks, reach beyond one node."""
    a_node, tp_size = run.cluster.gpus_per_node, run.parallel.tp_size
    return tp_size > a_node or (run.run.world_size > a_node and a_node % tp_size != 0)


def time_seconds(text: str) -> int:
    """Seconds of a time limit in Slurm's notation.

    Args:
        text: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Raises:
        ValueError: it is none of these.
    """
    if not _TIME.fullmatch(text):
        raise ValueError(text)
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _required(facts: Facts) -> Iterator[str]:
    cluster = facts.run.cluster
    where = {
        "partition": "one that `sinfo` lists",
        "account": "one that `sacctmgr show associations user=$USER` lists, or any word where the cluster keeps none",
    }
    for name, cure in where.items():
        if not getattr(cluster, name):
            yield f"cluster={cluster.name} needs cluster.{name}: set cluster.{name}=<{cure}>"
    if cluster.pyxis and not cluster.container_image:
        yield (
            f"cluster={cluster.name} runs stages in a container and got no image: set cluster.container_image=<registry/name:tag or a .sqsh "
            "file>, or cluster=slurm to run without"
        )


def _container(facts: Facts) -> Iterator[str]:
    cluster = facts.run.cluster
    if cluster.pyxis:
        for mount in cluster.container_mounts:
            source, colon, target = mount.partition(":")
            if not (colon and source.startswith("/") and target.startswith("/")):
                yield f"cluster.container_mounts has '{mount}': write /path/on/the/node:/path/in/the/container"
        return
    for name in ("container_image", "eval_image", "container_mounts"):
        if getattr(cluster, name):
            yield (
                f"cluster.{name} needs pyxis, which cluster={cluster.name} is not said to have: set cluster=slurm_pyxis, or leave "
                f"cluster.{name} out"
            )


def _layout(facts: Facts) -> Iterator[str]:
    run, cluster, layout = facts.run, facts.run.cluster, facts.run.parallel
    ranks = layout.tp_size * layout.pp_size * layout.cp_size
    if min(cluster.gpus_per_node, run.run.world_size, cluster.nodes or 1, ranks) < 1:
        return  # reported by the range rule
    many, world = nodes(run), run.run.world_size
    if (
        many * ranks_per_node(run) == world or world % ranks
    ):  # the latter is reported by the rule about the layout
        return
    each = cluster.gpus_per_node
    yield (
        f"{many} nodes x {each} GPUs = {many * each} do not make the layout's run.world_size={world}: set "
        f"{_nodes_for(world, each)}{_world_for(many, each, ranks, cluster.nodes)}"
    )


def _nodes_for(world: int, most: int) -> str:
    """The fewest nodes of at most so many GPUs that `world` ranks fill; nothing where only nodes of one GPU would do."""
    each = max(size for size in range(1, min(most, world) + 1) if world % size == 0)
    if each == 1 < world:
        return ""
    per_node = "" if each == min(most, world) else f" cluster.gpus_per_node={each}"
    return f"cluster.nodes={world // each}{per_node}, or "


def _world_for(many: int, each: int, ranks: int, given: int | None) -> str:
    """The fewest ranks, no fewer than these nodes have, that whole nodes and the layout make."""
    step = math.lcm(each, ranks)
    world = step * math.ceil(many * each / step)
    return f"run.world_size={world}" + (
        "" if given in (None, world // each) else f" cluster.nodes={world // each}"
    )


def _time_limit(facts: Facts) -> Iterator[str]:
    cluster = facts.run.cluster
    try:
        seconds = time_seconds(cluster.time)
    except ValueError:
        yield (
            f"cluster.time={cluster.time} is no time limit: write MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, for example "
            'cluster.time="04:00:00"'
        )
        return
    if seconds <= cluster.signal_seconds:
        yield (
            f"cluster.signal_seconds={cluster.signal_seconds} leaves nothing of cluster.time={cluster.time} ({seconds} s): raise "
            "cluster.time, or lower cluster.signal_seconds"
        )


def _variables(facts: Facts) -> Iterator[str]:
    for word in facts.run.cluster.env:
        if not _VARIABLE.fullmatch(word):
            yield f"cluster.env has '{word}': write NAME=VALUE, for example NCCL_DEBUG=INFO"


def _secrets(facts: Facts) -> Iterator[str]:
    for word in facts.run.cluster.env:
        name, _, value = word.partition("=")
        if _SECRET.search(name.upper()) or _PASSWORD_OF_A_PLACE.search(value):
            what = name if _SECRET.search(name.upper()) else f"{name} to an address with a password"
            yield (
                f"cluster.env sets {what}, and settings are written into run.json and batch scripts: export it in the shell that calls asft launch, "
                "which hands its environment on, or read it from a file of yours in cluster.setup"
            )


def _folder_name(facts: Facts) -> Iterator[str]:
    folder = Path(facts.run.run.dir).absolute()
    if not _FOLDER.fullmatch(str(folder)):
        yield (
            f"run.dir={folder} has characters that NeMo-Run's batch scripts do not quote: choose one of letters, digits and _ . , + @ - alone"
        )


def _only_slurm(facts: Facts) -> Iterator[str]:
    # the planner reads what this machine has: which GPUs, and how many of them are next to each other
    here = ("name", "executor", "env", "setup", "asft", "gpu", "gpus_per_node")
    given = [
        f"cluster.{name}"
        for name in ClusterConfig.__dataclass_fields__
        if name not in here and facts.asked(f"cluster.{name}")
    ]
    if given:
        yield f"{', '.join(given)} does nothing with cluster={facts.run.cluster.name}, which is this machine: leave it out, or set cluster=slurm"


def _cluster(facts: Facts) -> Iterator[str]:
    yield from _secrets(facts)
    if not facts.launched:
        return
    rows = (
        (_required, _container, _layout, _time_limit, words_for_slurm, _folder_name, unmountable)
        if on_slurm(facts.run)
        else (_only_slurm,)
    )
    for row in (*rows, _variables):
        yield from row(facts)


def _writable(facts: Facts) -> Iterator[str]:
    if not (facts.launched and on_slurm(facts.run)):
        return  # the rule about run.dir on this machine says it
    folder = Path(facts.run.run.dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        yield (
            f"run.dir={facts.run.run.dir} cannot be written ({folder} is {'read-only for you' if folder.is_dir() else 'a file'}): set run.dir "
            "to a folder of yours on a file system that all nodes share"
        )


CLUSTER: tuple[Rule, ...] = (_cluster,)
CLUSTER_INPUTS: tuple[Rule, ...] = (_writable,)
