"""What a rank of Slurm computes with, and the word it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from asft_nemo import slurm_ranks
from asft_nemo.config.load import compose
from asft_nemo.config.schema import RunConfig, replace
from asft_nemo.data import Prepared, prepare
from asft_nemo.launching.settings import write_settings
from asft_nemo.ranks import USER_ERROR_EXIT
from asft_nemo.slurm_ranks import _cores, _leave_cache


@pytest.mark.parametrize(
    ("variables", "bound", "cores"),
    [
        ({"SLURM_CPUS_PER_TASK": "14", "SLURM_CPUS_ON_NODE": "112"}, 14, 14),  # bound to what was asked for
        ({"SLURM_CPUS_PER_TASK": "14", "SLURM_CPUS_ON_NODE": "112"}, 112, 14),  # a cluster that binds nobody
        ({"SLURM_CPUS_PER_TASK": "14", "SLURM_CPUS_ON_NODE": "112"}, 7, 7),
        ({"SLURM_CPUS_ON_NODE": "112"}, 112, 14),  # all ranks share the node
        ({"SLURM_CPUS_ON_NODE": "112"}, 14, 14),  # bound by the cluster itself
        ({"SLURM_CPUS_ON_NODE": "8"}, 1, 1),
        ({}, 112, 14),
        ({}, 4, 1),
    ],
)
def test_cores_are_divided_among_ranks_once(variables: dict[str, str], bound: int, cores: int) -> None:
    assert _cores({"LOCAL_WORLD_SIZE": "8", **variables}, bound=bound) == cores


def test_a_cache_that_is_left_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asft_nemo.ranks.leave", lambda code: None)
    monkeypatch.setenv("ASFT_STOP_FILE", str(tmp_path / "word"))
    (tmp_path / "rows-00000-000000-0badcafe.safetensors").touch()
    (tmp_path / "rows-00000-000001-0badcafe.safetensors.partial").touch()
    words = ["experiment=tiny_gsm8k", "reference=cached", f"reference.cache_dir={tmp_path}"]
    _leave_cache(compose(words, check_inputs=False))
    assert (tmp_path / "word").read_text() == "1 whole files of the cache\n"


def test_a_rank_with_other_settings_than_were_launched_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    done: list[str] = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("asft_nemo.ranks.leave", leave)
    monkeypatch.setattr(slurm_ranks, "_enter", lambda: None)
    monkeypatch.setattr(slurm_ranks, "set_up_logging", lambda rank: None)
    monkeypatch.setattr(slurm_ranks.stop_signal, "listen", lambda at_once: None)
    monkeypatch.setattr(slurm_ranks, "_do", lambda run, job: done.append("trained"))
    monkeypatch.setattr(slurm_ranks, "_say", done.append)
    run = compose(["experiment=tiny", f"run.dir={tmp_path}"], check_inputs=False)
    write_settings(tmp_path, replace(run, {"optim.lr": 1.0}), words=())
    with pytest.raises(SystemExit) as left:
        slurm_ranks.run_rank(run, "train")
    assert left.value.code == USER_ERROR_EXIT
    assert len(done) == 1
    assert "optim.lr=" in done[0]


@pytest.mark.parametrize("left", [0, 1])
def test_a_job_that_came_back_prepares_its_data_once(
    left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = compose(["experiment=tiny", "model.path=assets/tiny-base", f"run.dir={tmp_path}"])
    prepared, trained = list[Prepared](), list[Prepared | None]()

    def prepares(run: RunConfig, *, tokenizer_dir: Path) -> Prepared:
        prepared.append(prepare(run, tokenizer_dir=tokenizer_dir))
        return prepared[-1]

    def trains(run: RunConfig, *, data: Prepared | None) -> None:
        trained.append(data)

    last = prepare(run, tokenizer_dir=run.model.path).max_steps
    monkeypatch.setattr("asft_nemo.data.prepare", prepares)
    monkeypatch.setattr("asft_nemo.train.train", trains)
    monkeypatch.setattr("asft_nemo.run_dir.resume_from", lambda _: tmp_path / f"step_{last - left}")
    slurm_ranks._do(run, "train")
    assert len(prepared) == 1
    assert trained == prepared[:left], "what is finished is not trained"
