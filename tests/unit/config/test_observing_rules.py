"""How a run is watched: which settings of W&B and of alarms are refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from asft_nemo.config.run_folder import has_trained, unwritable

Violations = Callable[..., tuple[str, ...]]


@pytest.mark.parametrize("name", ["a/b/c", "/project", "entity/", "what?", "a b/c"])
def test_what_is_no_name_of_a_project_is_refused(violations: Violations, name: str) -> None:
    (found,) = violations("objective=asft", f"trainer.wandb='{name}'")
    assert found.startswith(f"trainer.wandb={name} is no name of a project: set PROJECT or ENTITY/PROJECT")


def test_names_of_projects_are_taken(violations: Violations) -> None:
    for name in ("medical", "my-team/medical 72B"):
        assert violations("objective=asft", f"trainer.wandb='{name}'") == ()


def test_wandb_that_is_not_installed_is_refused(
    violations: Violations, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    (said,) = violations("objective=asft", "trainer.wandb=p")
    assert said.startswith("trainer.wandb=p needs wandb, which is not installed: pip install wandb, or leave")


def test_bounds_of_alarms(violations: Violations) -> None:
    assert violations("objective=asft", "alarms.straggler_factor=null", "alarms.nll_factor=null") == ()
    (found,) = violations("objective=asft", "alarms.straggler_factor=1")
    assert found == "alarms.straggler_factor=1.0 is out of range: set a value of more than 1"
    (found,) = violations("objective=asft", "alarms.nll_factor=null", "alarms.nll_window=9")
    assert found == "alarms.nll_window does nothing with alarms.nll_factor=null: leave it out"


def test_a_folder_has_trained_when_a_step_is_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert not has_trained(run)
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    assert not has_trained(run)
    (run / "metrics.jsonl").write_text("{}\n")
    assert has_trained(run)
    (run / "metrics.jsonl").unlink()
    (run / "checkpoints" / "step_1").mkdir()
    assert has_trained(run)


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert unwritable(tmp_path / "file" / "a" / "b") == f"{tmp_path / 'file'} is a file"
    assert unwritable(tmp_path / "new" / "run") is None
