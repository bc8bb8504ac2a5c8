"""Names of files mean on a node what they mean where the launch is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from asft_nemo.config.load import compose
from asft_nemo.config.schema import ClusterConfig
from asft_nemo.errors import ConfigError
from asft_nemo.launching.jobs import make_cache
from asft_nemo.launching.scripts import stage_script
from asft_nemo.launching.stages import Stage
from asft_nemo.launching.words import for_nodes


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "medqa.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_relative_names_become_absolute_and_names_stay(start: Path) -> None:
    words = [
        *("experiment=tiny_gsm8k", "model.path=base", "data.train=[a.jsonl,owner/set:train,/b.jsonl,x/*.parquet]"),
        *("eval.suites=[medqa,math,mine.jsonl,../suites/theirs,openai/gsm8k]", "data.validation=[./v.jsonl]", "trainer.validate_every=2"),
    ]  # fmt: skip
    run = for_nodes(compose(words, check_inputs=False, launched=True))
    assert run.model.path == str(start / "base")
    assert run.data.train == (
        str(start / "a.jsonl"),
        "owner/set:train",
        "/b.jsonl",
        str(start / "x/*.parquet"),
    )
    assert run.data.validation == (str(start / "v.jsonl"),)
    suites = ("medqa", "math", str(start / "mine.jsonl"), str(start.parent / "suites/theirs"), "openai/gsm8k")
    assert run.eval.suites == suites


def test_nothing_is_added_to_absolute_names(start: Path) -> None:
    run = compose(["experiment=tiny_gsm8k", "data.train=[/a.jsonl]"], check_inputs=False, launched=True)
    assert for_nodes(run) == run


def test_a_stage_runs_in_the_folder_that_nodes_share(start: Path) -> None:
    script = stage_script(Stage("export", ("true",)), ClusterConfig(name="x"), folder=Path("/shared/run"))
    assert "\ncd /shared/run\n" in script
    assert str(start) not in script


def test_a_cache_that_is_not_there_is_made_before_a_container_mounts_it(start: Path) -> None:
    words = ["experiment=tiny_gsm8k", "data.train=[/a.jsonl]", "reference=cached", "cluster=slurm_sandbox"]
    make_cache(
        compose([*words, f"reference.cache_dir={start / 'new' / 'cache'}"], check_inputs=False, launched=True)
    )
    assert (start / "new" / "cache").is_dir()
    inside = compose(
        [*words, f"reference.cache_dir={start / 'medqa.jsonl' / 'a'}"], check_inputs=False, launched=True
    )
    with pytest.raises(ConfigError, match=r"reference.cache_dir=.* cannot be made \(Not a directory\)"):
        make_cache(inside)
