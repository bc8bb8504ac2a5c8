"""What of a cluster's words goes to stages on a partition of their own, for those without GPUs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from asft_nemo.config.load import compose
from asft_nemo.launching.jobs import Place, render
from asft_nemo.launching.stages import Launch, build
from asft_nemo.launching.words import for_nodes

WORDS = [
    *("experiment=tiny_gsm8k", "data.train=[gsm8k/train.jsonl]", "run.dir=run"),
    *("cluster=slurm", "cluster.partition=gpu", "cluster.account=llm", "cluster.constraint=h100", "cluster.qos=long"),
    'cluster.sbatch_args=["comment=ours"]',
]  # fmt: skip
ALL = {"account": "llm", "partition": "gpu", "constraint": "h100", "qos": "long", "comment": "ours"}

Asked = Callable[..., tuple[dict[str, str], dict[str, str]]]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What sbatch is asked for by `prepare` and by `train`, with these settings."""
    monkeypatch.setenv("NEMORUN_HOME", "")  # which NeMo-Run's callers set for good
    monkeypatch.chdir(tmp_path)

    def draw(*words: str) -> tuple[dict[str, str], dict[str, str]]:
        run = for_nodes(compose([*WORDS, *words], check_inputs=False, launched=True))
        stages = build(
            Launch(run=run, asft=("asft",), folder=tmp_path / "run", prepared=True), ("prepare", "train")
        )
        scripts = render(run, stages, Place(tmp_path / "run", tmp_path, tmp_path / "home"), experiment="one")
        return _flags(str(scripts["prepare"].batch)), _flags(str(scripts["train"].batch))

    return draw


def _flags(batch: str) -> dict[str, str]:
    found = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", batch, re.MULTILINE))
    return {name: found[name] for name in ALL if name in found}


def test_gpu_nodes_are_not_asked_for_on_the_cpu_partition(asked: Asked) -> None:
    prepare, train = asked("cluster.cpu_partition=cpu")

    assert prepare == {"account": "llm", "partition": "cpu", "comment": "ours"}
    assert train == ALL


@pytest.mark.parametrize("words", [(), ("cluster.cpu_partition=gpu",)], ids=["none", "the same"])
def test_without_a_partition_of_their_own_all_stages_ask_alike(asked: Asked, words: tuple[str, ...]) -> None:
    assert asked(*words) == (ALL, ALL)
