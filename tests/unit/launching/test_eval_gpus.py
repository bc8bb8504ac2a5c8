"""An evaluation asks for the GPUs that hold its model."""

from __future__ import annotations

from pathlib import Path

import pytest

from asft_nemo.config.load import compose
from asft_nemo.config.paths import project_dir
from asft_nemo.launching.eval_gpus import eval_gpus
from asft_nemo.launching.jobs import Place, render
from asft_nemo.launching.stages import Stage

SLURM = ["cluster=slurm", "cluster.partition=gpu", "cluster.account=llm", "objective=asft"]


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (["recipe=qwen25_7b"], 1),
        (["recipe=qwen25_72b"], 4),  # 135 GiB on three quarters of 80
        (["recipe=qwen25_72b_full_16gpu_h200"], 2),
        (["recipe=qwen25_72b", "cluster.gpu=h200"], 2),
        (["recipe=qwen25_72b_full_64gpu_a100_40gb"], 8),
        (["recipe=llama2_70b", "cluster.gpus_per_node=2"], 2),
        (["recipe=qwen25_72b", "eval.backend=vllm", "eval.tensor_parallel_size=8"], 8),
        (["recipe=tiny_cpu"], 8),  # made for no published model, and the directory is not here
    ],
)
def test_as_many_as_hold_the_model(words: list[str], number: int) -> None:
    run = compose([*SLURM, *words, "model.path=nowhere"], check_inputs=False, launched=True)
    assert eval_gpus(run) == number


def test_the_model_that_is_there_decides() -> None:
    model = project_dir() / "assets" / "tiny-base"
    assert eval_gpus(compose([*SLURM, "recipe=tiny_cpu", f"model.path={model}"], check_inputs=False)) == 1


def test_slurm_is_asked_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path))
    run = compose(
        [*SLURM, "recipe=qwen25_72b", "model.path=nowhere", f"run.dir={tmp_path}"], check_inputs=False
    )
    drawn = render(run, [Stage("eval", ("true",), gpus=True)], Place.of(tmp_path), experiment="asft_1")
    assert "#SBATCH --gpus-per-node=4\n" in (drawn["eval"].batch or "")
