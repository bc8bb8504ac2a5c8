"""What `inspect` says of a directory, and what it says of one that it cannot read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapter_cases import write_adapters, write_base
from hf_cases import write_hf

from asft_nemo.checkpoint import import_hf
from asft_nemo.checkpoint.adapters import AdapterDescription
from asft_nemo.checkpoint.hf_files import read_origin, weights_directory
from asft_nemo.checkpoint.inspection import inspect
from asft_nemo.errors import CheckpointError

RUN = {
    "config": {
        "objective": {"name": "asft", "kl_weight": 0.05},
        "precision": "fp32",
        "parallel": {"tp_size": 2},
        "run": {"world_size": 4},
        "model": {"path": "base"},
    },
    "git_commit": "abc",
    "versions": {"torch": "2"},
}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run whose latest checkpoint is that of step 7."""
    write_hf(tmp_path / "hf")
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    import_hf(tmp_path / "hf", folder / "checkpoints" / "step_7")
    (folder / "checkpoints" / "latest").symlink_to("step_7")
    (folder / "run.json").write_text(json.dumps(RUN))
    return folder


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        inspect(path)
    return str(refused.value)


def test_a_runs_folder_is_its_latest_checkpoint(run_folder: Path) -> None:
    found = inspect(run_folder)
    assert (found.path.name, found.kind) == ("step_7", "nemo")
    assert found.run == {
        "step": 7,
        "objective": "asft",
        "kl_weight": 0.05,
        "precision": "fp32",
        "parallel": {"tp_size": 2},
        "world_size": 4,
        "model": "base",
        "git_commit": "abc",
        "versions": {"torch": "2"},
    }
    hf = inspect(run_folder.parent / "hf")
    assert (hf.kind, hf.run) == ("huggingface", None)
    assert (hf.parameters, hf.num_tensors) == (found.parameters, 39)


@pytest.mark.parametrize("text", ["{", "[]", '{"config": {}}'])
def test_a_damaged_run_json_is_refused(run_folder: Path, text: str) -> None:
    (run_folder / "run.json").write_text(text)
    said = refusal(run_folder)
    assert said.startswith(f"{run_folder / 'run.json'} is malformed (")
    assert said.endswith("): restore it, or move the checkpoint out of the run's folder")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert refusal(nowhere) == f"{nowhere} is not a directory: give the path of a checkpoint"
    nowhere.mkdir()
    assert refusal(nowhere).startswith(
        f"{nowhere} holds neither weights/, config.json nor adapter_config.json: "
    )


def test_peft_directories_must_be_whole(tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    for text in ("{", '{"r": 8}', '{"r": null, "lora_alpha": 1, "target_modules": []}'):
        config.write_text(text)
        assert refusal(tmp_path).startswith(f"{config} does not describe LoRA adapters (")
    config.write_text('{"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}')
    assert refusal(tmp_path) == (
        f"{tmp_path} holds no adapter_model.safetensors: save the adapters as safetensors"
    )


def test_adapters_are_described(tmp_path: Path) -> None:
    write_base(tmp_path / "hf")
    adapters = AdapterDescription(rank=4, alpha=8.0, dropout=0.0, targets=("linear_proj",))
    write_adapters(tmp_path / "adapters", tmp_path / "hf", adapters=adapters)
    found = inspect(tmp_path / "adapters")
    assert (found.kind, found.adapters) == ("nemo adapters", adapters)
    assert found.optimizer_tensors > 0


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ("config.json", "(this looks like a Hugging Face one: import it)"),
        (
            "adapter_config.json",
            "(these are PEFT adapters: train on with peft.adapter, or merge them with peft)",
        ),
        (
            "checkpoints/latest",
            "(this is a run's folder: its latest checkpoint is {folder}/checkpoints/latest)",
        ),
    ],
)
def test_another_kind_of_directory_than_a_nemo_checkpoint_is_named(
    tmp_path: Path, entry: str, hint: str
) -> None:
    (tmp_path / entry).parent.mkdir(exist_ok=True)
    (tmp_path / entry).write_text("{}")
    with pytest.raises(CheckpointError) as refused:
        weights_directory(tmp_path)
    expected = f"{tmp_path} holds no weights/ {hint.format(folder=tmp_path)}: give the directory of a NeMo checkpoint"
    assert str(refused.value) == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 999}, "is of format 999, newer than"),
        ({"format_version": "1"}, "is malformed (a field is of another type): import the base model again"),
        ({"source_dtype_exceptions": []}, "is malformed (a field is of another type)"),
        ({"more": 1}, "is malformed ("),
        (None, "is malformed ("),
    ],
)
def test_a_damaged_memory_of_the_origin_is_refused(run_folder: Path, change: dict | None, said: str) -> None:
    checkpoint = run_folder / "checkpoints" / "step_7"
    file = checkpoint / "context" / "asft.json"
    file.write_text("{" if change is None else json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError) as refused:
        read_origin(checkpoint)
    assert f"{file} {said}" in str(refused.value)
