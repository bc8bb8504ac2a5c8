"""How pyxis is told of an image."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asft_nemo.config.load import compose
from asft_nemo.config.mounts import image
from asft_nemo.launching import jobs
from asft_nemo.launching.stages import Stage


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvcr.io/nvidia/nemo:25.11", "nvcr.io#nvidia/nemo:25.11"),
        ("localhost:5000/team/asft:1", "localhost:5000#team/asft:1"),
        ("localhost/asft", "localhost#asft"),
        ("registry:5000/asft", "registry:5000#asft"),
        ("me@registry.example.com/team/asft:1", "me@registry.example.com#team/asft:1"),
        ("nvcr.io#nvidia/nemo:25.11", "nvcr.io#nvidia/nemo:25.11"),
        ("docker://nvcr.io/nvidia/nemo:25.11", "docker://nvcr.io/nvidia/nemo:25.11"),
        ("team/asft:1", "team/asft:1"),
        ("ubuntu:24.04", "ubuntu:24.04"),
        ("/shared/asft.sqsh", "/shared/asft.sqsh"),
        ("./asft.sqsh", "/home/me/asft.sqsh"),
        ("../asft", "/home/asft"),
        ("asft.sqsh", "/home/me/asft.sqsh"),
        ("images/asft.sqsh", "/home/me/images/asft.sqsh"),
        (None, None),
    ],
)
def test_files_are_absolute_and_hosts_are_marked(name: str | None, expected: str | None) -> None:
    assert image(name, Path("/home/me")) == expected


def test_what_evaluates_may_have_an_image_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMORUN_HOME", "")  # which NeMo-Run's callers set for good
    words = [
        *("experiment=tiny_gsm8k", "data.train=[/data/a.jsonl]", "eval.suites=[/data/s.jsonl]", "run.dir=/runs/a"),
        *("cluster=slurm_pyxis", "cluster.partition=gpu", "cluster.account=llm", "cluster.container_image=/train.sqsh"),
    ]  # fmt: skip

    def images(*more: str) -> dict[str, str]:
        run = compose([*words, *more], check_inputs=False, launched=True)
        stages = [
            Stage("train", ("true",), ranks=True),
            Stage("eval", ("true",)),
            Stage("compare", ("true",)),
        ]
        drawn = jobs.render(run, stages, jobs.Place(Path("/runs/a"), tmp_path, tmp_path), experiment="asft_0")
        return {
            name: re.findall(r"--container-image (\S+)", one.batch or "")[0] for name, one in drawn.items()
        }

    same = dict.fromkeys(("train", "eval", "compare"), "/train.sqsh")
    assert images() == same
    own = images("cluster.eval_image=registry.example.com/asft_eval:1")
    assert own == same | dict.fromkeys(("eval", "compare"), "registry.example.com#asft_eval:1")
