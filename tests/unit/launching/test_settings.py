"""Ranks train what was launched, or nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from asft_nemo import cli
from asft_nemo.config.load import compose
from asft_nemo.config.schema import RunConfig, replace
from asft_nemo.config.settings_file import compose_file
from asft_nemo.errors import ConfigError
from asft_nemo.launching.jobs import Place
from asft_nemo.launching.record import Record
from asft_nemo.launching.settings import refuse_other_settings, settings_file, write_settings
from asft_nemo.launching.stages import Stage


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return compose(["experiment=tiny", f"run.dir={tmp_path}"], check_inputs=False)


@pytest.fixture
def file(run: RunConfig) -> Path:
    write_settings(Path(run.run.dir), run, words=["experiment=tiny"])
    return settings_file(Path(run.run.dir))


def test_what_was_launched_comes_back_whatever_conf_and_recipes_say_now(
    run: RunConfig, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise AssertionError("conf/ and recipes/ are not those of the launch")

    for name in ("_compose_level", "recipe_fragment"):
        monkeypatch.setattr(f"asft_nemo.config.load.{name}", gone)
    assert compose_file(file) == run
    refuse_other_settings(compose_file(file))
    changed = compose_file(file, ["trainer.epochs=2", "data.train=[/b.jsonl]"], check_inputs=False)
    assert (changed.trainer.epochs, changed.trainer.max_steps) == (2, None), "the later word wins"
    assert changed == replace(
        run, {"trainer.epochs": 2, "trainer.max_steps": None, "data.train": ["/b.jsonl"]}
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["experiment=quick"], "composed already, and experiment=... would compose others: give single settings"),
        (["objective=sft", "recipe=qwen25_7b"], "and objective=..., recipe=... would compose others"),
        (["optim.lrs=1"], "optim.lrs is not a setting: did you mean optim.lr?"),
        (["objective.kl_weight=-1"], "objective.kl_weight=-1.0 is out of range"),
        (["parallel.tp_size=3"], "run.world_size=4"),
    ],
)  # fmt: skip
def test_words_that_a_file_cannot_take_are_refused(file: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_file(file, words, check_inputs=False)
    assert sentence in str(caught.value)


def test_a_file_that_holds_something_else_is_refused(file: Path, tmp_path: Path) -> None:
    values = json.loads(file.read_text())
    values["config"]["optim"]["lookahead"] = 3
    (tmp_path / "newer.json").write_text(json.dumps(values))
    (tmp_path / "list.json").write_text("[]")
    for name, sentence in {
        "newer.json": "another version of asft_nemo than this one .* does not know optim.lookahead: use that version",
        "list.json": "holds no composed settings: give launch/settings.json or run.json",
        "none.json": r"cannot be read \(No such file or directory\)",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            compose_file(tmp_path / name)


@pytest.mark.usefixtures("file")
def test_a_rank_that_was_told_something_else_is_refused(run: RunConfig) -> None:
    edited = replace(run, {"optim.lr": 1e-3, "objective.kl_weight": 0.5})
    with pytest.raises(ConfigError, match=r"optim\.lr=0\.001 here, .* there.*launch again") as caught:
        refuse_other_settings(edited)
    assert "objective.kl_weight=0.5 here" in str(caught.value)


@pytest.mark.usefixtures("keep_logging_and_warnings")
def test_a_launch_leaves_what_its_ranks_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def submitted(run: RunConfig, stages: Sequence[Stage], place: Place, *, experiment: str) -> Record:
        read = compose_file(settings_file(place.folder), check_inputs=False)
        assert read.trainer.max_steps == 3
        assert read.data.train == (str(tmp_path / "r" / "data" / "train"),)
        return Record(experiment, "local", "local", ())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("asft_nemo.launching.jobs.submit", submitted)
    assert cli.main(["launch", "experiment=tiny", "run.dir=r", "trainer.max_steps=3"]) == 0
