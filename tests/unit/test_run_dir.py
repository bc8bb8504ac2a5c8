"""The folder of a run: when it may be used, continued, or is refused; a refusal leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from asft_nemo import cli, run_dir
from asft_nemo.checkpoint.convert import import_hf
from asft_nemo.config.paths import project_dir
from asft_nemo.config.schema import RunConfig, from_dict, replace
from asft_nemo.errors import CheckpointError, ConfigError
from asft_nemo.run_dir import (
    append_line,
    base_checkpoint,
    check_run_dir,
    checkpoint_steps,
    drop_steps_after,
    git_commit,
    initial_adapters,
    open_run_dir,
    point_at,
    refuse_busy,
    resume_from,
)

TINY = project_dir() / "assets" / "tiny-base"


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return from_dict(
        {
            "recipe": "tiny_cpu",
            "objective": {"name": "asft"},
            "reference": {"form": "resident"},
            "peft": {"name": "none"},
            "model": {"path": str(TINY)},
            "cluster": {"name": "local"},
            "run": {"dir": str(tmp_path / "run"), "world_size": 1},
        }
    )


def with_checkpoint(run: RunConfig) -> Path:
    """An imported base standing in for the checkpoint of step 2: its tensors are the model's."""
    folder = Path(run.run.dir) / "checkpoints"
    folder.mkdir(parents=True)
    import_hf(TINY, folder / "step_2")
    point_at(folder, "latest", "step_2")
    return folder


def test_a_new_run_writes_its_record(run: RunConfig) -> None:
    open_run_dir(run, data_fingerprint="f")
    record = json.loads((Path(run.run.dir) / "run.json").read_text())
    assert record["data_fingerprint"] == "f"
    assert from_dict(record["config"]) == run
    assert resume_from(run) is None


def test_a_folder_of_another_run_is_refused(run: RunConfig) -> None:
    open_run_dir(run, data_fingerprint="f").release()
    (Path(run.run.dir) / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"holds another run: choose another run\.dir"):
        open_run_dir(run, data_fingerprint="f")


def test_a_folder_with_other_things_is_refused_and_kept(run: RunConfig) -> None:
    folder = Path(run.run.dir)
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        open_run_dir(run, data_fingerprint="f")
    assert [entry.name for entry in folder.iterdir()] == ["thesis.txt"]


def test_must_without_a_checkpoint_says_so(run: RunConfig) -> None:
    must = replace(run, {"trainer.resume": "must"})
    with pytest.raises(CheckpointError, match=r"trainer\.resume=must, but .* holds no complete checkpoint"):
        open_run_dir(must, data_fingerprint="f")
    assert not Path(run.run.dir).exists()


def test_if_exists_starts_or_continues(run: RunConfig) -> None:
    maybe = replace(run, {"trainer.resume": "if_exists"})
    open_run_dir(maybe, data_fingerprint="f").release()
    assert resume_from(maybe) is None
    folder = with_checkpoint(run)
    assert resume_from(maybe) == (folder / "step_2").resolve()
    open_run_dir(maybe, data_fingerprint="f").release()


@pytest.mark.parametrize("resume", ["never", "if_exists"])
def test_a_start_that_was_refused_leaves_the_folder_free(run: RunConfig, resume: str) -> None:
    """run.json was there before the ranks found what is wrong: the mended command is not told that there is another run."""
    open_run_dir(run, data_fingerprint="f").release()
    mended = replace(run, {"trainer.resume": resume, "optim.lr": 1e-5})
    open_run_dir(mended, data_fingerprint="g").release()
    record = json.loads((Path(run.run.dir) / "run.json").read_text())
    assert (record["config"]["optim"]["lr"], record["data_fingerprint"]) == (1e-5, "g")


def test_the_base_of_a_start_that_was_refused_is_not_taken_for_another_model(
    run: RunConfig, tmp_path: Path
) -> None:
    open_run_dir(run, data_fingerprint="f").release()
    base_checkpoint(run)
    other = replace(run, {"model.path": str(tmp_path / "elsewhere")})
    open_run_dir(other, data_fingerprint="f").release()
    with pytest.raises(ConfigError, match=r"was made from .*tiny-base, and model\.path=.*elsewhere"):
        base_checkpoint(other)


@pytest.mark.parametrize("place", ["/proc/asft/run", "{tmp}/file/run"])
def test_a_folder_that_cannot_be_written_is_one_sentence(run: RunConfig, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    there = replace(run, {"run.dir": place.replace("{tmp}", str(tmp_path))})
    with pytest.raises(ConfigError, match=r"run\.dir=.* cannot be written \(.+\): choose another run\.dir"):
        open_run_dir(there, data_fingerprint="f")


def test_another_model_is_another_run_before_the_first_checkpoint_too(run: RunConfig, tmp_path: Path) -> None:
    """base/ was imported from the first model: going on with another would train and anchor to the wrong one."""
    open_run_dir(run, data_fingerprint="f").release()
    (Path(run.run.dir) / "metrics.jsonl").write_text('{"step": 1}\n')
    other = replace(run, {"trainer.resume": "if_exists", "model.path": str(tmp_path / "elsewhere")})
    with pytest.raises(ConfigError, match=r"another run \(different: model\)"):
        open_run_dir(other, data_fingerprint="f")


def test_one_process_at_a_time(run: RunConfig) -> None:
    lock = open_run_dir(run, data_fingerprint="f")
    before = (Path(run.run.dir) / "run.json").stat().st_mtime_ns
    with pytest.raises(
        ConfigError, match=rf"is being trained in by process {os.getpid()} of .+ on .+: wait for it"
    ):
        open_run_dir(replace(run, {"trainer.resume": "if_exists"}), data_fingerprint="f")
    assert (Path(run.run.dir) / "run.json").stat().st_mtime_ns == before
    lock.release()


def test_a_link_to_nowhere_is_said(run: RunConfig) -> None:
    folder = with_checkpoint(run)
    point_at(folder, "latest", "step_9")
    with pytest.raises(CheckpointError, match=r"step_9, which is not there: point it at one of \['step_2'\]"):
        resume_from(replace(run, {"trainer.resume": "if_exists"}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"objective.kl_weight": 0.5}, "objective"),
        ({"run.seed": 1}, "run.seed"),
        ({"optim.lr": 1.0}, "optim"),
        ({"trainer.global_batch_size": 128}, "trainer.global_batch_size"),
    ],
)
def test_a_run_continues_only_as_itself(run: RunConfig, change: dict[str, object], named: str) -> None:
    open_run_dir(run, data_fingerprint="f").release()
    with_checkpoint(run)
    before = (Path(run.run.dir) / "run.json").read_bytes()
    other = replace(run, {"trainer.resume": "must", **change})
    with pytest.raises(ConfigError, match=rf"another run \(different: {named}\)"):
        open_run_dir(other, data_fingerprint="f")
    assert (Path(run.run.dir) / "run.json").read_bytes() == before


def test_changed_data_are_another_run(run: RunConfig) -> None:
    open_run_dir(run, data_fingerprint="f").release()
    with_checkpoint(run)
    with pytest.raises(ConfigError, match="the contents of the data files"):
        open_run_dir(replace(run, {"trainer.resume": "must"}), data_fingerprint="g")


def test_a_run_from_before_a_setting_came_continues_with_its_default(run: RunConfig) -> None:
    open_run_dir(run, data_fingerprint="f").release()
    with_checkpoint(run)
    record = Path(run.run.dir) / "run.json"
    before = json.loads(record.read_text())
    for key in ("weights_by", "when_exhausted", "templates", "group_by_length"):
        del before["config"]["data"][key]
    record.write_text(json.dumps(before))
    resumed = replace(run, {"trainer.resume": "must"})
    with pytest.raises(ConfigError, match=r"another run \(different: data\)"):
        open_run_dir(replace(resumed, {"data.group_by_length": True}), data_fingerprint="f")
    open_run_dir(resumed, data_fingerprint="f")


def test_the_layout_may_change(run: RunConfig) -> None:
    open_run_dir(run, data_fingerprint="f").release()
    with_checkpoint(run)
    open_run_dir(replace(run, {"trainer.resume": "must", "parallel.tp_size": 2}), data_fingerprint="f")


def test_packed_rows_belong_to_a_context_parallel_size(run: RunConfig) -> None:
    """Segments are rounded up to what the ranks can share: another size packs other rows, and the order of the data is one of rows."""
    for packing in (False, True):
        settings = {"data.packing": packing, "run.dir": f"{run.run.dir}_{packing}"}
        before = replace(run, settings)
        open_run_dir(before, data_fingerprint="f").release()
        with_checkpoint(before)
        other = replace(before, {"trainer.resume": "must", "parallel.cp_size": 2, "run.world_size": 2})
        if not packing:
            open_run_dir(other, data_fingerprint="f")
        else:
            with pytest.raises(
                ConfigError, match=r"different: parallel\.cp_size, which packed rows depend on"
            ):
                open_run_dir(other, data_fingerprint="f")


def test_a_checkpoint_of_another_shape_is_refused(run: RunConfig, tmp_path: Path) -> None:
    """Weights of one model under another's config.json: named before anything is loaded."""
    import_hf(TINY, tmp_path / "base")
    config_file = tmp_path / "base" / "context" / "hf" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "intermediate_size": config["intermediate_size"] * 2}))
    (tmp_path / "base" / "seal.json").unlink()  # changed on purpose
    with pytest.raises(CheckpointError, match=r"linear_fc1.weight has shape .* where config.json asks for"):
        base_checkpoint(replace(run, {"model.path": str(tmp_path / "base")}))


def test_the_base_is_imported_once(run: RunConfig) -> None:
    folder = base_checkpoint(run)
    stamp = (folder / "weights" / ".metadata").stat().st_mtime_ns
    assert base_checkpoint(run) == folder
    assert (folder / "weights" / ".metadata").stat().st_mtime_ns == stamp


@pytest.mark.usefixtures("keep_logging_and_warnings")
def test_a_base_of_another_model_is_refused_whoever_imported_it(run: RunConfig, tmp_path: Path) -> None:
    """The stages of a launched run import by themselves: training must not go on with what lies there."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    base = Path(run.run.dir) / "base"
    assert cli.main(["import", str(model), str(base)]) == 0
    with pytest.raises(
        ConfigError, match=r"base was made from .*/model, and model\.path=.*tiny-base: choose"
    ):
        base_checkpoint(run)
    mine = replace(run, {"model.path": str(model)})
    assert base_checkpoint(mine) == base
    os.utime(model / "model.safetensors", (1, 1))
    with pytest.raises(ConfigError, match=r"base was made from .*/model before its weights changed"):
        base_checkpoint(mine)
    (base / "context" / "asft.json").unlink()
    with pytest.raises(ConfigError, match="does not say which model it was made from"):
        base_checkpoint(mine)


@pytest.mark.usefixtures("keep_logging_and_warnings")
def test_an_import_that_is_there_already_is_held_against_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "base")
    assert [cli.main(["import", str(TINY), out, "--once"]) for _ in range(2)] == [0, 0]
    assert "is there already" in capsys.readouterr().out
    shutil.copytree(TINY, tmp_path / "other")
    assert cli.main(["import", str(tmp_path / "other"), out, "--once"]) == 2
    assert "was made from" in capsys.readouterr().err
    assert cli.main(["import", str(TINY), out, "--once", "--dtype", "bf16"]) == 2


def test_latest_moves_and_steps_are_read(tmp_path: Path) -> None:
    for name in ("step_2", "step_10", "partial_step_12"):
        (tmp_path / name).mkdir()
    point_at(tmp_path, "latest", "step_2")
    point_at(tmp_path, "latest", "step_10")
    assert (tmp_path / "latest").resolve().name == "step_10"
    assert checkpoint_steps(tmp_path) == [2, 10]


def test_metrics_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    drop_steps_after(file, 2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


def peft_directory(folder: Path) -> Path:
    """A rank-4 adapter of every down projection, as PEFT saves it."""
    config = json.loads((TINY / "config.json").read_text())
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    tensors = {
        f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_{side}.weight": torch.randn(shape)
        for layer in range(config["num_hidden_layers"])
        for side, shape in (("A", (4, ffn)), ("B", (hidden, 4)))
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    description = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(description))
    return folder


def test_a_peft_directory_becomes_adapters_once(run: RunConfig, tmp_path: Path) -> None:
    """It is read at the first start; a second one finds what was made of it, and other settings are refused before anything is written."""
    source = peft_directory(tmp_path / "peft")
    run = replace(run, {"peft.name": "lora", "peft.adapter": str(source), "peft.rank": 2})
    base = base_checkpoint(run)
    with pytest.raises(CheckpointError, match=r"needs rank 4, got peft.rank=2: set peft.rank=4 peft.alpha=8"):
        initial_adapters(run, base)
    folder = Path(run.run.dir) / "adapter"
    assert not folder.exists()
    run = replace(run, {"peft.rank": 4, "peft.alpha": 8.0})
    assert initial_adapters(run, base) == folder
    check_run_dir(run, data_fingerprint="f")  # a folder with base/ and adapter/ alone is no run yet
    shutil.rmtree(source)
    assert initial_adapters(run, base) == folder
    with pytest.raises(CheckpointError, match="was made with other settings of peft"):
        initial_adapters(replace(run, {"peft.alpha": 9.0}), base)
    assert initial_adapters(replace(run, {"peft.adapter": None}), base) is None


def test_a_repository_around_an_installation_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], [*user, "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    installed = tmp_path / "env" / "site-packages" / "asft_nemo"
    installed.mkdir(parents=True)
    monkeypatch.setattr(run_dir, "__file__", str(installed / "run_dir.py"))
    assert git_commit() is None
    monkeypatch.setattr(run_dir, "__file__", str(tmp_path / "asft_nemo" / "run_dir.py"))
    (tmp_path / "asft_nemo").mkdir()
    assert len(str(git_commit())) == 40


def test_a_damaged_line_costs_that_line_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n{"step": 4}\n{"step"')
    drop_steps_after(file, 3)
    assert file.read_text() == '{"step": 1}\n{"step": 3}\n'
    assert "line 2 is damaged" in caplog.text


@pytest.mark.parametrize("left", ["", '{"step": 1}\n', '{"step": 1}\n{"step": 2, "te', '{"ste'])
def test_a_line_is_never_added_to_a_torn_one(left: str, tmp_path: Path) -> None:
    """Else a kill in mid-line would cost the next start's line, too."""
    file = tmp_path / "starts.jsonl"
    file.write_text(left)
    append_line(file, {"step": 5})
    whole = left[: left.rfind("\n") + 1]
    assert file.read_text() == whole + '{"step": 5}\n'


def test_a_run_without_its_run_json_is_not_gone_on_with(run: RunConfig) -> None:
    """Nothing would show that it is the same run."""
    folder = Path(run.run.dir)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(
        ConfigError, match=r"holds a run, and no run\.json that says which: copy context/run\.json"
    ):
        check_run_dir(replace(run, {"trainer.resume": "if_exists"}), data_fingerprint="x")


def test_a_damaged_run_json_is_named_with_its_cure(run: RunConfig) -> None:
    folder = Path(run.run.dir)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    for text in ("", "{", "[]", "{}", "null"):
        (folder / "run.json").write_text(text)
        with pytest.raises(
            ConfigError, match=r"run\.json is damaged .*: copy context/run\.json of the latest"
        ):
            check_run_dir(replace(run, {"trainer.resume": "if_exists"}), data_fingerprint="x")


def test_a_busy_folder_is_refused_before_anything_is_read(run: RunConfig) -> None:
    """Its checkpoints may be going as they are looked at; a folder that nobody holds stays as it is."""
    refuse_busy(run)
    assert not Path(run.run.dir).exists()
    lock = open_run_dir(run, data_fingerprint="x")
    with pytest.raises(ConfigError, match=rf"is being trained in by process {os.getpid()} of"):
        refuse_busy(run)
    lock.release()
    before = (Path(run.run.dir) / ".run.owner").read_text()
    refuse_busy(run)
    open_run_dir(run, data_fingerprint="x").release()
    assert (Path(run.run.dir) / ".run.owner").read_text() == before
