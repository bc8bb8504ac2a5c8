"""Words of one's own for sbatch and srun, and those that scripts and restarts rely on: these are settings, or nobody's to change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from asft_nemo.config.facts import Facts

_SBATCH = re.compile(r"[a-z][a-z-]*=[^\n]*")
_SRUN = re.compile(r"--([a-z][a-z-]*)(=[^\n]*)?")

_GPUS, _TASKS = "set cluster.gpus_per_node", "set run.world_size"
_IMAGE = "set cluster.container_image"

#: option of both and its cure; "" = there is none
_OF_BOTH = {
    "account": "set cluster.account",
    "array": "",
    "chdir": "stages run in run.dir",
    "constraint": "set cluster.constraint",
    "cpus-per-task": "set cluster.cpus_per_task",
    "dependency": "choose what waits for what with --stages",
    "distribution": "ranks that follow each other share a node",
    "error": "",
    "exclusive": "set cluster.exclusive=true",
    "export": "set cluster.env",
    "export-file": "set cluster.env",
    "gpus": _GPUS,
    "gpus-per-node": _GPUS,
    "gpus-per-task": _GPUS,
    "input": "",
    "job-name": "it is made of the last part of run.dir and the stage",
    "mem": "set cluster.mem",
    "nodes": "set cluster.nodes",
    "ntasks": _TASKS,
    "ntasks-per-core": _GPUS,
    "ntasks-per-gpu": _GPUS,
    "ntasks-per-node": _GPUS,
    "ntasks-per-socket": _GPUS,
    "open-mode": "",
    "output": "",
    "partition": "set cluster.partition",
    "qos": "set cluster.qos",
    "signal": "set cluster.signal_seconds",
    "time": "set cluster.time",
}
_OF_SBATCH = {
    **_OF_BOTH,
    "kill-on-invalid-dep": "",
    "no-requeue": "set cluster.max_requeues=0",
    "requeue": "set cluster.max_requeues",
}
_NODES = 'set cluster.sbatch_args=["nodelist=..."] or ["exclude=..."]'
_OF_SRUN = {
    **_OF_BOTH,
    "container-entrypoint": "",
    "container-image": _IMAGE,
    "container-mounts": "set cluster.container_mounts",
    "exclude": _NODES,
    "het-group": "",
    "jobid": "",
    "kill-on-bad-exit": "",
    "multi-prog": "",
    "no-kill": "",
    "nodefile": _NODES,
    "nodelist": _NODES,
    "pty": "",
    "relative": "",
}


def words_for_slurm(facts: Facts) -> Iterator[str]:
    """Rule: the form of cluster.sbatch_args and cluster.srun_args, and what they may not say."""
    cluster = facts.run.cluster
    for word in cluster.sbatch_args:
        name = word.partition("=")[0]
        if _SBATCH.fullmatch(word.lower().replace("_", "-")):
            yield from _taken("sbatch_args", word, name, _OF_SBATCH)
        else:
            yield f"cluster.sbatch_args has '{word}': write NAME=VALUE, for example mail-type=END"
    for word in cluster.srun_args:
        found = _SRUN.fullmatch(word)
        if found:
            yield from _taken("srun_args", word, found[1], _OF_SRUN)
        else:
            yield f"cluster.srun_args has '{word}': write --NAME or --NAME=VALUE as one word, for example --mpi=pmix"


def _taken(key: str, word: str, name: str, ours: Mapping[str, str]) -> Iterator[str]:
    # Slurm takes any beginning that is clear: `tim` is `time`
    name = name.lower().replace("_", "-")
    flag = name if name in ours else next((flag for flag in ours if flag.startswith(name)), None)
    if flag is not None:
        cure = f" ({ours[flag]})" if ours[flag] else ""
        yield f"cluster.{key} has '{word}', but --{flag} is what asft launch itself relies on: leave it out{cure}"
