"""Rules that look at files and at this machine, checked where a run is about to begin."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from asft_nemo.config import fp8
from asft_nemo.config.cluster_rules import CLUSTER_INPUTS, on_slurm
from asft_nemo.config.facts import Facts, Rule
from asft_nemo.config.hub_ids import hub_id
from asft_nemo.config.kernel_rules import KERNELS_HERE
from asft_nemo.config.machine import gpu_count
from asft_nemo.config.observing_rules import wandb_here
from asft_nemo.config.run_folder import BASE_FOLDER, has_trained, other_base, unwritable


def _data_files(facts: Facts) -> Iterator[str]:
    files = facts.run.data.train
    if not files:
        yield "data.train is empty: set data.train=[file.jsonl]"
    for name in (*files, *facts.run.data.validation):
        if not (Path(name).exists() or glob.glob(name, recursive=True) or hub_id(name)):
            yield f"data file {name} does not exist (looked in {Path.cwd()}): correct data.train, or fetch it (asft data download --list)"


def _elsewhere(facts: Facts) -> bool:
    """Whether ranks will run on a cluster's nodes, of which this machine says nothing."""
    return facts.launched and on_slurm(facts.run)


def _machine(facts: Facts) -> Iterator[str]:
    if _elsewhere(facts) or "ASFT_SLURM_RANKS" in os.environ:  # this is one of many machines
        return
    world, cores = facts.run.run.world_size, os.cpu_count() or 1
    gpus = gpu_count()
    most = gpus or max(16, 4 * cores)
    if world > most:
        have = f"{gpus} GPUs" if gpus else f"{cores} CPU cores, at most {most} ranks"
        yield (
            f"run.world_size={world} is more ranks than this machine can run ({have}): "
            "lower parallel.tp_size, parallel.pp_size or run.world_size"
        )


def _adapter_directory(facts: Facts) -> Iterator[str]:
    given, run = facts.run.peft.adapter, facts.run
    resumed = run.trainer.resume != "never" and (Path(run.run.dir) / "checkpoints" / "latest").exists()
    if run.peft.name == "none" or given is None or resumed:  # a resumed run has adapters of its own
        return
    if not (Path(given) / "adapter_config.json").is_file():
        yield (
            f"peft.adapter={given} is no directory with an adapter_config.json (looked in {Path.cwd()}): set "
            "peft.adapter=<directory that save_pretrained of peft wrote>"
        )


def _run_dir(facts: Facts) -> Iterator[str]:
    folder, resume = Path(facts.run.run.dir), facts.run.trainer.resume
    if folder.exists() and not folder.is_dir():
        yield f"run.dir={folder} is a file: give a directory"
    elif (problem := unwritable(folder)) is not None and not _elsewhere(facts):
        yield f"run.dir={folder} cannot be written ({problem}): choose another run.dir"
    elif resume == "must" and not (folder / "checkpoints" / "latest").exists():
        yield (
            f"trainer.resume=must but {folder} has no checkpoint: correct run.dir, or set "
            "trainer.resume=never"
        )
    elif resume == "never" and has_trained(folder):
        yield (
            f"run.dir={folder} holds another run: choose another run.dir, "
            "or set trainer.resume=must to go on with it"
        )


def _base(facts: Facts) -> Iterator[str]:
    base, model = Path(facts.run.run.dir) / BASE_FOLDER, Path(facts.run.model.path)
    if base.is_dir() and not (model / "weights").is_dir() and (problem := other_base(base, model)):
        yield problem


def _fp8_machine(facts: Facts) -> Iterator[str]:
    if not _elsewhere(facts):
        yield from fp8.machine_violations(facts.run)


def _wandb(facts: Facts) -> Iterator[str]:
    if not _elsewhere(facts):
        yield from wandb_here(facts)


def _kernels(facts: Facts) -> Iterator[str]:
    for row in () if _elsewhere(facts) else KERNELS_HERE:
        yield from row(facts)


INPUTS: tuple[Rule, ...] = (
    _data_files,
    _machine,
    _fp8_machine,
    _kernels,
    _wandb,
    _adapter_directory,
    _run_dir,
    _base,
    *CLUSTER_INPUTS,
)
