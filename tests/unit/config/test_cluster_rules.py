"""Rules about the cluster: each fires for `asft launch`, says the cure, and leaves every other command alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from sentences import sentences

from asft_nemo.config.cluster_rules import nodes, ranks_per_node, time_seconds
from asft_nemo.config.load import compose, known_options
from asft_nemo.config.schema import RunConfig
from asft_nemo.errors import ConfigError

FINE = ["cluster.partition=gpu", "cluster.account=llm"]


@pytest.fixture
def launched(model_dir: Path, data_file: Path, tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    """The sentences that a launch's overrides lead to."""

    def call(*overrides: str, check_inputs: bool = False) -> tuple[str, ...]:
        base = ["recipe=tiny_cpu", "objective=sft", f"model.path={model_dir}", f"data.train=[{data_file}]"]
        words = [*base, f"run.dir={tmp_path / 'run'}", *overrides]
        return sentences(lambda: compose(words, check_inputs=check_inputs, launched=True))

    return call


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["cluster=slurm", "cluster.account=llm"], "cluster=slurm needs cluster.partition: set cluster.partition=<one that `sinfo` lists>"),
        (["cluster=slurm", "cluster.partition=gpu"], "cluster=slurm needs cluster.account: set cluster.account=<one that `sacctmgr show"),
        (["cluster=slurm_pyxis", *FINE], "runs stages in a container and got no image: set cluster.container_image="),
        (["cluster=slurm", *FINE, "cluster.container_image=a.sqsh"], "cluster.container_image needs pyxis, which cluster=slurm is not said to have"),
        (["cluster=slurm", *FINE, 'cluster.container_mounts=["/a:/a"]'], "cluster.container_mounts needs pyxis"),
        (["cluster=slurm", *FINE, "cluster.eval_image=a.sqsh"], "cluster.eval_image needs pyxis"),
        (
            ["cluster=slurm_pyxis", *FINE, "cluster.container_image=a.sqsh", "cluster.container_mounts=[data]"],
            "cluster.container_mounts has 'data': write /path/on/the/node:/path/in/the/container",
        ),
        (
            ["cluster=slurm", *FINE, "cluster.nodes=2", "run.world_size=8", "trainer.global_batch_size=16"],
            "2 nodes x 8 GPUs = 16 do not make the layout's run.world_size=8: set cluster.nodes=1, or run.world_size=16",
        ),
        (
            ["cluster=slurm", *FINE, "run.world_size=12", "trainer.global_batch_size=24"],
            "2 nodes x 8 GPUs = 16 do not make the layout's run.world_size=12: set cluster.nodes=2 cluster.gpus_per_node=6, or run.world_size=16",
        ),
        (
            ["cluster=slurm", *FINE, "run.world_size=36", "trainer.global_batch_size=72"],
            "5 nodes x 8 GPUs = 40 do not make the layout's run.world_size=36: set cluster.nodes=6 cluster.gpus_per_node=6, or run.world_size=40",
        ),
        (
            ["cluster=slurm", *FINE, "run.world_size=13", "trainer.global_batch_size=26"],
            "2 nodes x 8 GPUs = 16 do not make the layout's run.world_size=13: set run.world_size=16",
        ),
        (
            ["cluster=slurm", *FINE, "cluster.nodes=1", "run.world_size=12", "parallel.pp_size=3", "parallel.first_stage_layers=2", "trainer.global_batch_size=16"],
            "1 nodes x 8 GPUs = 8 do not make the layout's run.world_size=12: set cluster.nodes=2 cluster.gpus_per_node=6, or run.world_size=24 cluster.nodes=3",
        ),
        (  # the layout is what is wrong: nothing is said of nodes
            ["cluster=slurm", *FINE, "run.world_size=36", "parallel.tp_size=2", "parallel.pp_size=4", "parallel.sequence_parallel=false"],
            "run.world_size=36 is not a multiple of tp_size x pp_size x cp_size = 2 x 4 x 1 = 8: set run.world_size=32",
        ),
        (["cluster=slurm", *FINE, "cluster.time=tomorrow"], "cluster.time=tomorrow is no time limit: write MM, MM:SS, HH:MM:SS"),
        (["cluster=slurm", *FINE, "cluster.time='00:04:00'"], "cluster.signal_seconds=300 leaves nothing of cluster.time=00:04:00 (240 s)"),
        (["cluster=slurm", *FINE, "cluster.env=[debug]"], "cluster.env has 'debug': write NAME=VALUE, for example NCCL_DEBUG=INFO"),
        (["cluster=slurm", *FINE, "cluster.env=['8GPUS=1']"], "cluster.env has '8GPUS=1': write NAME=VALUE, for example NCCL_DEBUG=INFO"),
        (["cluster=slurm", *FINE, "cluster.env=['WANDB_API_KEY=abc']"], "cluster.env sets WANDB_API_KEY, and settings are written into run.json"),
        (["cluster.env=['hf_token=abc']"], "cluster.env sets hf_token, and settings are written into run.json"),
        (["cluster.env=['WANDB_KEY=abc']"], "cluster.env sets WANDB_KEY, and"),
        (["cluster.env=['GITHUB_PAT=abc']"], "cluster.env sets GITHUB_PAT, and"),
        (["cluster.env=['https_proxy=http://me:abc@proxy:3128']"], "cluster.env sets https_proxy to an address with a password, and"),
        (["cluster=slurm", *FINE, "cluster.sbatch_args=[END]"], "cluster.sbatch_args has 'END': write NAME=VALUE, for example mail-type=END"),
        (["cluster=slurm", *FINE, "run.dir='/tmp/a b'"], "run.dir=/tmp/a b has characters that NeMo-Run's batch scripts do not quote"),
        (["cluster=slurm", *FINE, "cluster.gpus_per_node=0"], "cluster.gpus_per_node=0 is out of range"),
        (["cluster.partition=gpu"], "cluster.partition does nothing with cluster=local, which is this machine"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)  # fmt: skip
def test_one_rule(launched: Callable[..., tuple[str, ...]], overrides: list[str], sentence: str) -> None:
    (only,) = launched(*overrides)
    assert sentence in only


def test_variables_are_named_as_a_shell_names_them(launched: Callable[..., tuple[str, ...]]) -> None:
    assert (
        launched(
            "cluster=slurm",
            *FINE,
            "cluster.env=['http_proxy=http://proxy:3128','_x=','A1=a b','WANDB_IDENTITY_TOKEN_FILE=/home/me/token','TOKENIZERS_PARALLELISM=false','HOTKEYS=1','no_proxy=a@b:1/c']",
        )
        == ()
    )


def test_secrets_are_refused_where_nothing_is_launched() -> None:
    """Such a run writes its settings, too."""
    with pytest.raises(ConfigError, match=r"cluster\.env sets HF_TOKEN, and settings are written"):
        compose(["recipe=tiny_cpu", "cluster.env=['HF_TOKEN=abc']"], check_inputs=False)


def test_everything_wrong_is_said_at_once(launched: Callable[..., tuple[str, ...]]) -> None:
    assert (
        len(launched("cluster=slurm_pyxis", "cluster.time=x", "cluster.env=[a]", "objective.name=asfd")) == 6
    )


def test_what_is_not_given_does_not_hide_what_is_wrong() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=medical_qwen25_72b", "cluster=slurm"], check_inputs=False, launched=True)
    assert [text.partition(":")[0] for text in caught.value.violations] == [
        "model.path is not set",
        "cluster=slurm needs cluster.partition",
        "cluster=slurm needs cluster.account",
    ]
    with pytest.raises(ConfigError) as caught:
        compose(["recipe=tiny_cpu", "data.train=[nowhere.jsonl]", "optim.lr=0"])
    sentences = caught.value.violations
    assert "objective.name is not set" in sentences[0]
    assert not any("<" in text.partition(" is not set")[0] for text in sentences)
    assert any(text.startswith("optim.lr=0.0 is out of range") for text in sentences)


def test_an_unwritable_folder_is_found_before_anything_is_submitted(
    launched: Callable[..., tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    (only,) = launched("cluster=slurm", *FINE, check_inputs=True)
    assert re.search(r"cannot be written \(.* is read-only for you\): set run.dir to a folder of yours", only)
    (tmp_path / "file").touch()
    (only,) = launched("cluster=slurm", *FINE, f"run.dir={tmp_path / 'file' / 'run'}", check_inputs=True)
    assert "is a file): set run.dir" in only


def test_more_ranks_than_this_machine_runs_are_no_matter_on_a_cluster(
    launched: Callable[..., tuple[str, ...]],
) -> None:
    many = ["run.world_size=4096", "trainer.global_batch_size=8192"]
    assert launched("cluster=slurm", *FINE, *many, check_inputs=True) == ()
    (only,) = launched(*many, check_inputs=True)
    assert "more ranks than this machine can run" in only


@pytest.mark.parametrize("cluster", [name for name in known_options("cluster") if name != "local"])
def test_other_commands_are_told_nothing_of_clusters(cluster: str, model_dir: Path) -> None:
    words = ["recipe=tiny_cpu", "objective=sft", f"model.path={model_dir}", f"cluster={cluster}"]
    compose(words, check_inputs=False)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("30", 1800), ("30:15", 1815), ("4:00:00", 14400), ("04:00:30", 14430)),
        *(("1-2", 93600), ("1-02:30", 95400), ("2-00:00:00", 172800)),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert time_seconds(text) == seconds


@pytest.mark.parametrize(
    ("word", "cure"),
    [
        (
            "signal=B:TERM@60",
            "--signal is what asft launch itself relies on: leave it out (set cluster.signal_seconds)",
        ),
        ("time=1:00", "--time is what asft launch itself relies on: leave it out (set cluster.time)"),
        ("tim=1:00", "--time is what asft launch itself relies on: leave it out (set cluster.time)"),
        (
            "requeue=0",
            "--requeue is what asft launch itself relies on: leave it out (set cluster.max_requeues)",
        ),
        ("output=x", "--output is what asft launch itself relies on: leave it out"),
        ("gpus=4", "--gpus is what asft launch itself relies on: leave it out (set cluster.gpus_per_node)"),
    ],
)
def test_what_the_launcher_relies_on_is_not_taken_from_it(
    launched: Callable[..., tuple[str, ...]], word: str, cure: str
) -> None:
    (only,) = launched("cluster=slurm", *FINE, f'cluster.sbatch_args=["{word}"]')
    assert f"cluster.sbatch_args has '{word}', but {cure}" == only


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("--export=NONE", "but --export is what asft launch itself relies on: leave it out (set cluster.env)"),
        ("--kill-on-bad=0", "but --kill-on-bad-exit is what asft launch itself relies on: leave it out"),
        ("--ntasks=3", "but --ntasks is what asft launch itself relies on: leave it out (set run.world_size)"),
        ("--container-image=a", "but --container-image is what asft launch itself relies on: leave it out (set cluster.container_image)"),
        ("-N2", "write --NAME or --NAME=VALUE as one word, for example --mpi=pmix"),
        ("pmix", "write --NAME or --NAME=VALUE as one word, for example --mpi=pmix"),
    ],
)  # fmt: skip
def test_srun_is_not_told_what_the_launcher_relies_on(
    launched: Callable[..., tuple[str, ...]], word: str, sentence: str
) -> None:
    (only,) = launched("cluster=slurm", *FINE, f'cluster.srun_args=["{word}"]')
    assert only.startswith(f"cluster.srun_args has '{word}'")
    assert only.endswith(sentence)


@pytest.mark.parametrize(
    "word",
    [
        *("mail-type=END", "time-min=10", "gres=gpu:8", "mem-per-cpu=4G", "wait-all-nodes=1", "comment=two words"),
        *("--mpi=pmix", "--no-container-mount-home", "--wait=30", "--cpu-bind=none", "--comment=two words", "--label"),
    ],
)  # fmt: skip
def test_slurm_may_be_told_the_rest(launched: Callable[..., tuple[str, ...]], word: str) -> None:
    key = "srun_args" if word.startswith("--") else "sbatch_args"
    assert launched("cluster=slurm", *FINE, f'cluster.{key}=["{word}"]') == ()


@pytest.mark.parametrize("text", ["", "4h", "1:2:3:4", "1-", "-5", "00:99", "4:00:00 ", "INFINITE"])
def test_what_is_no_time_limit(text: str) -> None:
    with pytest.raises(ValueError):
        time_seconds(text)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["run.world_size=32", "trainer.global_batch_size=64"], (4, 8)),
        (["run.world_size=2"], (1, 2)),
        (["run.world_size=8", "trainer.global_batch_size=16", "cluster.gpus_per_node=4"], (2, 4)),
    ],
)
def test_nodes_follow_from_the_ranks(settings: list[str], expected: tuple[int, int], model_dir: Path) -> None:
    words = ["recipe=tiny_cpu", "objective=sft", f"model.path={model_dir}", "cluster=slurm", *FINE]
    run: RunConfig = compose([*words, *settings], check_inputs=False, launched=True)
    assert (nodes(run), ranks_per_node(run)) == expected
