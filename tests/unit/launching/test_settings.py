"""Ranks train what was launched, or nothing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from asft_nemo import cli
from asft_nemo.config import paths
from asft_nemo.config.load import compose
from asft_nemo.config.schema import RunConfig, replace
from asft_nemo.errors import ConfigError
from asft_nemo.launching import settings
from asft_nemo.launching.jobs import Place
from asft_nemo.launching.record import Record
from asft_nemo.launching.settings import refuse_other_settings, write_settings
from asft_nemo.launching.stages import Stage


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return compose(["experiment=tiny", f"run.dir={tmp_path}"], check_inputs=False)


def test_the_same_settings_are_the_same_in_another_place_of_the_project(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_other_settings(run)  # nothing was launched
    write_settings(Path(run.run.dir), run)
    refuse_other_settings(replace(run, {"trainer.resume": "if_exists"}))
    inside = str(run.model.path).replace(str(paths.project_dir()), "/opt/asft")
    elsewhere = replace(run, {"model.path": inside, "eval.suites": ()})
    monkeypatch.setattr(settings, "project_dir", lambda: Path("/opt/asft"))
    with pytest.raises(ConfigError) as caught:
        refuse_other_settings(elsewhere)
    assert "model.path" not in str(caught.value)


def test_a_conf_that_gives_other_settings_is_refused_with_their_names(run: RunConfig) -> None:
    write_settings(Path(run.run.dir), run)
    edited = replace(run, {"optim.lr": 1e-3, "objective.kl_weight": 0.5})
    with pytest.raises(ConfigError, match=r"optim\.lr=0\.001 here, .* there.*Launch again") as caught:
        refuse_other_settings(edited)
    assert "objective.kl_weight=0.5 here" in str(caught.value)


@pytest.mark.usefixtures("keep_logging_and_warnings")
def test_a_launch_says_what_its_ranks_compose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def submitted(run: RunConfig, stages: Sequence[Stage], place: Place, *, experiment: str) -> Record:
        (train,) = (stage for stage in stages if stage.name == "train")
        words = shlex.split(train.lines[-1].replace("\\\n", " "))
        composed = compose(words[words.index("train") + 1 :], check_inputs=False)
        refuse_other_settings(composed)
        with pytest.raises(ConfigError, match=r"data\.train"):
            refuse_other_settings(replace(composed, {"data.train": ("other.jsonl",)}))
        return Record(experiment, "local", "local", ())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("asft_nemo.launching.jobs.submit", submitted)
    assert cli.main(["launch", "experiment=tiny", "run.dir=r", "trainer.max_steps=3"]) == 0
    assert (tmp_path / "r" / settings.FILE).is_file()
