"""A launch that its GPUs cannot hold is refused ahead of the queue, and one that is slow for its nodes is told so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asft_nemo import cli
from asft_nemo.config.load import compose
from asft_nemo.config.schema import RunConfig
from asft_nemo.config.tables import CHOICES
from asft_nemo.errors import ConfigError
from asft_nemo.launching.fit import published_shape, refuse_too_large, training_plan, warnings
from asft_nemo.planner.gpus import GPUS

BIG = ["experiment=medical_qwen25_72b", "model.path=/models/base", "run.dir=/shared/run"]
SLURM = ["cluster=slurm", "cluster.partition=gpu", "cluster.account=llm", "cluster.exclusive=true"]
TOO_LARGE = ["parallel.pp_size=1", "parallel.vpp_size=null", "run.world_size=8"]


def run_of(*words: str) -> RunConfig:
    return compose([*BIG, *SLURM, *words], check_inputs=False, launched=True, shape_of=published_shape)


@pytest.fixture
def guest(keep_logging_and_warnings: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEMORUN_HOME", "")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("guest")
def test_what_cannot_fit_is_refused_unless_forced(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", *BIG, *SLURM, *TOO_LARGE, "--dry-run", "--json", "--stages"]
    assert cli.main([*words, "train"]) == 2
    said = capsys.readouterr()
    assert (
        "training on h100-80gb does not fit: stage 0 needs 182.4 of 79.6 GiB, the largest part is the opt"
        in said.err
    )
    assert said.err.count("\n") == 1
    assert cli.main([*words, "export"]) == 0
    assert json.loads(capsys.readouterr().out)["training"] is None
    assert cli.main([*words, "train", "--force"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert not values["training"]["fits"]
    assert values["warnings"] == ["training will run out of memory, if the plan is right"]


def test_the_cluster_s_gpus_decide() -> None:
    recipes_own, smaller = training_plan(run_of()), training_plan(run_of("cluster.gpu=a100-40gb"))
    assert recipes_own is not None
    assert smaller is not None
    refuse_too_large(recipes_own)
    assert (recipes_own.gpu.name, smaller.gpu.name) == ("h100-80gb", "a100-40gb")
    with pytest.raises(ConfigError, match=r"on a100-40gb does not fit: .*cluster\.gpu=h200"):
        refuse_too_large(smaller)
    made_for_h200 = run_of("recipe=qwen25_72b_full_16gpu_h200", "cluster.gpu=h100-80gb")
    plan = training_plan(made_for_h200)
    assert plan is not None
    with pytest.raises(ConfigError, match="on h100-80gb does not fit"):
        refuse_too_large(plan)


def test_a_gpu_is_one_that_the_planner_knows() -> None:
    assert CHOICES["cluster.gpu"] == tuple(GPUS)
    with pytest.raises(ConfigError, match=r"cluster\.gpu=v100 is unknown: set one of h100-80gb, h200"):
        run_of("cluster.gpu=v100")


def test_ranks_on_cpus_have_no_gpu_to_fill() -> None:
    assert training_plan(run_of("cluster.env=['ASFT_DEVICE=cpu']")) is None
    tiny = compose(["experiment=tiny", *SLURM], check_inputs=False, launched=True)
    assert training_plan(tiny) is None


def test_gpus_of_this_machine_are_planned_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    here = compose([*BIG, *TOO_LARGE], check_inputs=False, launched=True, shape_of=published_shape)
    plan = training_plan(here)
    assert plan is not None
    with pytest.raises(ConfigError, match=r"on h100-80gb does not fit: .*add --force"):
        refuse_too_large(plan)
    with_h200 = [*BIG, *TOO_LARGE, "cluster.gpu=h200", "cluster.gpus_per_node=4"]  # as the sentence says
    plan = training_plan(compose(with_h200, check_inputs=False, launched=True, shape_of=published_shape))
    assert plan is not None
    assert (plan.gpu.name, plan.run.cluster.gpus_per_node) == ("h200", 4)
    monkeypatch.setenv("ASFT_DEVICE", "cpu")
    assert training_plan(here) is None
    tiny = compose(["experiment=tiny"], check_inputs=False, launched=True)
    monkeypatch.delenv("ASFT_DEVICE")
    assert training_plan(tiny) is None


def test_a_dry_run_knows_the_published_model_where_model_path_is_elsewhere() -> None:
    with pytest.raises(ConfigError, match="does not divide the model's 8 key/value heads"):
        run_of("parallel.tp_size=16", "run.world_size=64")


def test_tensor_groups_beyond_a_node_are_slow_and_said_to_be() -> None:
    whole, half = run_of(), run_of("cluster.gpus_per_node=4")
    assert warnings(whole, None) == []
    (said,) = warnings(half, None)
    assert "parallel.tp_size=8 ranks reach beyond nodes of cluster.gpus_per_node=4" in said
    assert said.endswith("parallel.tp_size=4 stays inside")
    plans = [training_plan(run) for run in (whole, half)]
    seconds = [plan.step.seconds for plan in plans if plan is not None]
    assert seconds[1] > 1.1 * seconds[0]


@pytest.mark.parametrize(
    "said",
    [
        *("cluster.exclusive=true", "cluster.mem='0'", "cluster.cpus_per_task=12", "cluster.request_gpus=false"),
        *('cluster.sbatch_args=["mem-per-gpu=200G"]', 'cluster.sbatch_args=["CPUs_per_gpu=12"]'),
    ],
)  # fmt: skip
def test_cores_and_memory_left_to_slurm_are_warned_of(said: str) -> None:
    nothing = run_of("cluster.exclusive=false")
    (warning,) = warnings(nothing, training_plan(nothing))
    assert "gives each of a node's ranks (8) one core and the memory of that core" in warning
    assert (
        "set cluster.exclusive=true cluster.mem=\"'0'\" cluster.cpus_per_task=<cores of a node / 8>"
        in warning
    )
    assert warnings(nothing, None) == []  # no training on GPUs
    asked = run_of("cluster.exclusive=false", said)
    assert warnings(asked, training_plan(asked)) == []


@pytest.mark.usefixtures("guest")
def test_a_launch_shows_the_warning(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", *BIG, *SLURM, "cluster.exclusive=false", "--stages", "train", "--dry-run"]
    assert cli.main(words) == 0
    assert "\nwarning: the training asks for neither cores nor memory" in capsys.readouterr().out
    here = compose(BIG, check_inputs=False, launched=True, shape_of=published_shape)
    assert warnings(here, training_plan(here)) == []
