"""Settings of the evaluation are checked when a launch begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sentences import sentences

from asft_nemo import cli
from asft_nemo.config.load import compose
from asft_nemo.launching import eval_fit
from asft_nemo.launching.eval_check import check_evaluation

Checked = Callable[..., tuple[str, ...]]


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checked:
    """The sentences that a launch's settings of the evaluation lead to."""
    monkeypatch.setenv("ASFT_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nemo" / "weights").mkdir(parents=True)

    def call(*overrides: str, look_for_files: bool = False) -> tuple[str, ...]:
        run = compose(
            ["recipe=tiny_cpu", "objective=sft", "model.path=m", *overrides],
            check_inputs=False,
            launched=True,
        )
        return sentences(lambda: check_evaluation(run, look_for_files=look_for_files))

    return call


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["eval.suites=[medqa]", "eval.backend=hff"], "eval.backend=hff is unknown: did you mean 'hf'?"),
        (["eval.suites=[medqa]", "eval.backend=openai"], "none serves what this launch will export: set eval.backend=vllm or hf"),
        (["eval.suites=[medqa]", "eval.tensor_parallel_size=2"], "tensor_parallel_size says nothing to the backend hf: leave it out, or choose backend vllm"),
        (["eval.suites=[medqa]", "eval.backend=vllm", "eval.tensor_parallel_size=16", "cluster=slurm", "cluster.partition=p", "cluster.account=a"],
         "more than the 8 GPUs of a node"),
        (["eval.suites=[medqa]", "eval.protocol=gredy"], "eval.protocol=gredy cannot be used: there is no protocol 'gredy': did you mean 'greedy'? choose one of"),
        (["eval.suites=[medqa]", "eval.protocol=pass@0"], "pass@K with K from 1"),
        (["eval.suites=[medqa]", "eval.prompt=alpca"], "eval.prompt=alpca is unknown: did you mean 'alpaca'"),
        (["eval.suites=[medqqa]"], "eval.suites has 'medqqa', which is no suite and no JSON Lines file: did you mean 'medqa'"),
        (["eval.suites=[openai/gsm9k]"], "eval.suites has 'openai/gsm9k', which is no suite and no JSON Lines file: did you mean 'openai/gsm8k'"),
        (["eval.suites=[openai/openai_humaneval]"], "eval.suites has humaneval, and the model's programs are run"),
        (["eval.drift=held_out.jsonl", "model.path=nemo"], "eval.drift measures how far the model goes from a Hugging Face base"),
        (["eval.suites=[code]"], "the model's programs are run to grade them: set eval.allow_code_execution=true"),
    ],
)  # fmt: skip
def test_a_name_that_is_none_is_said_before_the_training(
    checked: Checked, overrides: list[str], sentence: str
) -> None:
    (only,) = checked(*overrides)
    assert sentence in only


SLURM = ("cluster=slurm", "cluster.partition=p", "cluster.account=a", "model.path=nowhere")
VLLM = ("eval.suites=[medqa]", "eval.backend=vllm")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["recipe=qwen25_72b", *VLLM, "eval.tensor_parallel_size=3"],
         "eval.tensor_parallel_size=3 GPUs cannot share 64 attention heads and 8 key/value heads evenly: set 1 or 2 or 4 or 8"),
        (["recipe=qwen25_72b", *VLLM, "eval.tensor_parallel_size=1"], "the weights take 135.4 GiB: set eval.tensor_parallel_size to 2 or 4 or 8"),
        (["recipe=qwen25_72b", *VLLM, "cluster.gpus_per_node=1"], "whose 1 x h100-80gb (cluster.gpus_per_node) are too small for weights of 135.4 GiB"),
        (["recipe=qwen25_72b", "eval.suites=[medqa]", "cluster.gpus_per_node=2"], "2 x h100-80gb (cluster.gpus_per_node) are too small"),
        (["recipe=qwen25_72b", "eval.drift=held.jsonl", "cluster.gpus_per_node=2"], "2 x h100-80gb (cluster.gpus_per_node) are too small"),
        (["recipe=qwen25_72b", *VLLM, "eval.drift=held.jsonl", "cluster.gpus_per_node=2"], "2 x h100-80gb (cluster.gpus_per_node) are too small"),
    ],
)  # fmt: skip
def test_what_cannot_load_the_model_is_said_before_the_training(
    checked: Checked, overrides: list[str], sentence: str
) -> None:
    (only,) = checked(*SLURM, *overrides)
    assert sentence in only


@pytest.mark.parametrize(
    "overrides",
    [
        ["recipe=qwen25_72b", *VLLM, "eval.tensor_parallel_size=2"],
        ["recipe=qwen25_72b", *VLLM, "cluster.gpus_per_node=2"],
        ["recipe=qwen25_72b", "eval.drift=held.jsonl"],
        ["recipe=qwen25_72b", "eval.drift=held.jsonl", "cluster.gpu=h200", "cluster.gpus_per_node=2"],
        ["recipe=qwen25_72b_full_64gpu_a100_40gb", "eval.drift=held.jsonl"],
        ["recipe=llama3_70b", "eval.suites=[medqa]"],
        ["recipe=qwen25_7b", "eval.suites=[medqa]", "cluster.gpus_per_node=1"],
    ],
)
def test_a_node_that_holds_the_model_passes(checked: Checked, overrides: list[str]) -> None:
    assert checked(*SLURM, *overrides) == ()


def test_vllm_is_looked_for_where_this_python_runs_it(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[object] = []
    monkeypatch.setattr(eval_fit, "find_spec", lambda _: there or None)
    words = [*VLLM, "cluster.env=['ASFT_DATA_DIR=/shared/evaldata']"]
    for cluster in ((), SLURM):
        (only,) = checked(*cluster, *words, look_for_files=True)
        assert only.startswith("eval.backend=vllm needs vLLM, and the Python that would evaluate is this one")
        assert checked(*cluster, *words) == (), "a dry run may be made elsewhere"
    assert checked(*SLURM, *words, "cluster.asft=/opt/eval/bin/asft", look_for_files=True) == ()
    assert checked("eval.drift=held.jsonl", "eval.backend=vllm") == (), "transformers reads it"
    there.append("found")
    assert checked(*words, look_for_files=True) == ()


@pytest.mark.parametrize(
    "overrides",
    [
        ["eval.suites=[medqa,math,mine.jsonl]", "eval.protocol=both"],
        ["eval.suites=[code]", "eval.allow_code_execution=true", "eval.protocol=pass@8"],
        ["eval.suites=[medqa]", "eval.backend=vllm", "eval.tensor_parallel_size=4"],
    ],
)
def test_what_is_known_passes(checked: Checked, overrides: list[str]) -> None:
    assert checked(*overrides) == ()


def test_files_are_looked_for_when_jobs_are_submitted(checked: Checked, tmp_path: Path) -> None:
    words = ["eval.suites=[mine.jsonl,medqa]"]
    assert checked(*words) == ()
    (text,) = checked("eval.drift=held_out.jsonl", look_for_files=True)
    assert text.endswith("held_out.jsonl does not exist: correct it, or leave it out")
    missing, published = checked(*words, look_for_files=True)
    assert "eval.suites has mine.jsonl, which does not exist: correct it" in missing
    assert published.startswith("eval.suites=medqa cannot be used: suite medqa is not here: ")
    (tmp_path / "mine.jsonl").touch()
    elsewhere = [*words, "cluster.env=['ASFT_DATA_DIR=/shared/evaldata']"]
    assert checked(*elsewhere, look_for_files=True) == ()


@pytest.mark.usefixtures("keep_logging_and_warnings")
def test_only_a_launch_that_evaluates_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NEMORUN_HOME", "")
    monkeypatch.chdir(tmp_path)
    words = ["launch", "experiment=tiny", "eval.backend=vlm", "--dry-run"]
    assert cli.main(words) == 2
    assert "eval.backend=vlm is unknown" in capsys.readouterr().err
    assert cli.main([*words, "--stages", "export"]) == 0
