"""An evaluation asks for the GPUs that hold its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from asft_eval.backends.placement import spread
from asft_eval.reading import reading_dtype

from asft_nemo.config.load import compose
from asft_nemo.config.paths import project_dir
from asft_nemo.launching.eval_gpus import eval_gpus, free_memory
from asft_nemo.launching.jobs import Place, render
from asft_nemo.launching.stages import Stage
from asft_nemo.model import parameter_count
from asft_nemo.planner.published import PUBLISHED, spec_of_run

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


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (["recipe=qwen25_7b"], 1),
        (["recipe=qwen25_32b"], 2),
        (["recipe=qwen25_72b"], 4),
        (["recipe=qwen25_72b_full_16gpu_h200"], 2),
        (["recipe=qwen25_72b_full_64gpu_a100_40gb"], 8),
        (["recipe=llama3_70b"], 4),
        (["recipe=qwen25_72b", "eval.suites=[medqa]", "eval.backend=vllm", "eval.tensor_parallel_size=2"], 4),
        (["recipe=qwen25_7b", "eval.suites=[medqa]", "eval.backend=vllm", "eval.tensor_parallel_size=4"], 4),
        (["recipe=qwen25_7b", "eval.suites=[medqa]", "eval.backend=vllm", "eval.tensor_parallel_size=1"], 1),
    ],
)
def test_what_reads_held_out_text_has_room_on_them(
    words: list[str], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the GPUs asked for say when the stored checkpoint is read: transformers' placement takes it."""
    words = [*SLURM, *words, "model.path=nowhere", "eval.drift=held.jsonl"]
    run = compose(words, check_inputs=False, launched=True)
    assert eval_gpus(run) == number
    (tmp_path / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    loaded = reading_dtype(tmp_path).itemsize * parameter_count(spec_of_run(run))
    spread(tmp_path, loaded, [free_memory(run)] * number)  # raises where they are too small


def test_a_base_that_is_stored_in_fp32_needs_more(tmp_path: Path) -> None:
    for dtype, number in (("bfloat16", 1), ("float32", 2)):
        config = {**PUBLISHED["Qwen/Qwen2.5-7B"], "num_hidden_layers": 64, "dtype": dtype}  # 15 B numbers
        (tmp_path / "config.json").write_text(json.dumps(config))
        words = ["recipe=qwen25_7b", "cluster.gpu=a100-80gb", f"model.path={tmp_path}"]
        assert eval_gpus(compose([*SLURM, *words], check_inputs=False, launched=True)) == number


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
