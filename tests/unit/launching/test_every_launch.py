"""Every experiment on every cluster, through `asft launch --dry-run`: settings compose, rules pass, scripts are drawn and parse."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asft_nemo import cli
from asft_nemo.config.load import known_options
from asft_nemo.config.mounts import variables
from asft_nemo.config.schema import RunConfig
from asft_nemo.launching import jobs
from asft_nemo.launching.scripts import stage_script
from asft_nemo.launching.stages import Stage

QUEUE = ["cluster.partition=gpu", "cluster.account=llm"]
NEEDS = {"slurm": QUEUE, "slurm_pyxis": [*QUEUE, "cluster.container_image=nvcr.io/nvidia/nemo:25.11"]}
OWN = {"tiny_gsm8k": ["data.train=[gsm8k.jsonl]"]}  # what an experiment's header asks for, besides the model
Render = Callable[..., dict[str, jobs.Rendered]]


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command sets up logging, warnings and NeMo-Run's home for its whole process; here it is only a guest."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setenv("NEMORUN_HOME", "")
    with warnings.catch_warnings():
        yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def draw_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo-Run draws batch scripts that are alike but for the lines of the stages once: it takes some 50 ms for each."""
    monkeypatch.setattr(jobs, "render", _once(jobs.render))


def _once(render: Render) -> Render:
    drawn: dict[Any, dict[str, jobs.Rendered]] = {}

    def wrapped(
        run: RunConfig, stages: Sequence[Stage], place: jobs.Place, *, experiment: str
    ) -> dict[str, jobs.Rendered]:
        sizes = tuple((stage.name, stage.ranks, stage.gpus, stage.after) for stage in stages)
        key = (run.cluster, run.run.world_size, sizes, run.data.train, run.eval.suites)
        if key not in drawn:
            found = render(run, stages, place, experiment=experiment)
            home = str(place.home)
            drawn[key] = {
                name: replace(one, batch=one.batch and one.batch.replace(home, "/HOME"))
                for name, one in found.items()
            }
            assert {name: one.script for name, one in found.items()} == _scripts(run, stages, place)
        scripts = _scripts(run, stages, place)
        return {
            name: replace(one, script=scripts[name], batch=one.batch and one.batch.replace("/HOME", str(place.home)))
            for name, one in drawn[key].items()
        }  # fmt: skip

    return wrapped


def _scripts(run: RunConfig, stages: Sequence[Stage], place: jobs.Place) -> dict[str, str]:
    """What nodes run, with the line that NeMo-Run puts first."""
    return {
        stage.name: "#!/usr/bin/bash\n"
        + stage_script(stage, run.cluster, folder=place.folder, variables=variables(run))
        for stage in stages
    }


@pytest.mark.usefixtures("draw_once")
@pytest.mark.parametrize(
    ("cluster", "experiments"),
    [
        *(pytest.param(cluster, ["paper"], id=cluster) for cluster in known_options("cluster")),
        pytest.param("slurm", known_options("experiment"), id="slurm-every_experiment"),
        *(
            pytest.param(
                cluster, known_options("experiment"), id=f"{cluster}-every_experiment", marks=pytest.mark.long
            )
            for cluster in known_options("cluster")
            if cluster != "slurm"
        ),
    ],
)
def test_experiments_are_launched_dry(
    cluster: str, experiments: Sequence[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    scripts: dict[str, str] = {}  # without the experiment's name, so that each kind is checked once
    for experiment in experiments:
        words = [
            f"experiment={experiment}",
            f"cluster={cluster}",
            *NEEDS.get(cluster, ()),
            *OWN.get(experiment, ()),
        ]
        given = [] if experiment.startswith("tiny") else ["model.path=/models/base"]
        code = cli.main(["launch", *words, *given, "run.dir=/shared/run", "--dry-run", "--json"])
        said = capsys.readouterr()
        assert code == 0, f"{experiment} on {cluster}: {said.err}"
        answer = json.loads(said.out)
        stages = {stage["name"]: stage for stage in answer["stages"]}
        assert {"import", "train", "export"} <= set(stages), experiment
        if cluster != "local":
            started = _ranks(stages["train"]["batch_script"])
            assert started == answer["settings"]["run.world_size"], experiment
        for name, stage in stages.items():
            for text in filter(None, (stage["script"], stage["batch_script"])):
                scripts[text.replace(f"experiment={experiment}", "experiment=E")] = f"{experiment}-{name}"
    _parse(list(scripts), tmp_path)


def _ranks(batch: str) -> int:
    """Ranks that Slurm starts."""
    sizes = dict(re.findall(r"^#SBATCH --(nodes|ntasks-per-node)=(\d+)$", batch, flags=re.MULTILINE))
    return int(sizes["nodes"]) * int(sizes["ntasks-per-node"])


def _parse(scripts: Sequence[str], folder: Path) -> None:
    """Bash's opinion of all, and shellcheck's of what is ours."""
    names = []
    for number, text in enumerate(scripts):
        names.append(f"{number}{'' if '#SBATCH' in text else '_ours'}.sh")
        (folder / names[-1]).write_text(text)
    every = 'for script in *.sh; do bash -n "$script" || exit 1; done'
    done = subprocess.run(["bash", "-c", every], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck") is not None:
        ours = [name for name in names if name.endswith("_ours.sh")]
        done = subprocess.run(["shellcheck", *ours], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
