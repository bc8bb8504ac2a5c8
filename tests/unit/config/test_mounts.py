"""What containers see, and which names pyxis cannot be given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from asft_nemo.config.load import compose
from asft_nemo.config.mounts import mounts, variables
from asft_nemo.config.schema import RunConfig
from asft_nemo.errors import ConfigError


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of files, while the current directory is another; nothing comes from the hub's cache."""
    for name in ("shared/data", "elsewhere", "home"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("ASFT_DATA_DIR", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "shared"


def run_with(*words: str) -> RunConfig:
    queue = ("cluster.partition=gpu", "cluster.account=llm", "cluster.container_image=/images/asft.sqsh")
    few = [
        "experiment=tiny_gsm8k",
        "cluster=slurm_pyxis",
        *queue,
        "model.path=/models/base",
        "run.dir=/runs/a",
    ]
    return compose([*few, "data.train=[/data/a.jsonl]", *words], check_inputs=False, launched=True)


def test_only_what_is_named_is_mounted(shared: Path) -> None:
    run = run_with(
        f"data.train=[{shared}/x/*.parquet,owner/set]",
        "cluster.container_mounts=[/lustre:/models]",
        "eval.suites=[/suites/s.jsonl]",
    )
    expected = {"/lustre:/models", "/runs/a:/runs/a", "/suites:/suites", f"{shared}/x:{shared}/x"}
    home = str(shared.parent / "home")
    assert set(mounts(run)) == expected | {f"{home}:{home}"}, "the hub's cache has owner/set"


def test_blobs_behind_a_snapshot_of_the_hub_are_mounted(shared: Path) -> None:
    snapshot = shared / "models--x" / "snapshots" / "abc"
    blobs = shared / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1f").touch()
    (snapshot / "model.safetensors").symlink_to("../../blobs/1f")
    found = mounts(run_with(f"model.path={snapshot}"))
    assert {f"{snapshot}:{snapshot}", f"{blobs}:{blobs}"} <= set(found)
    (shared / "current").symlink_to(snapshot)  # the container has no link there, so that .. leads elsewhere
    found = mounts(run_with(f"model.path={shared / 'current'}"))
    assert f"{blobs}:{shared.parent / 'blobs'}" in found


def test_files_behind_links_of_data_are_mounted(shared: Path) -> None:
    (shared / "archive").mkdir()
    (shared / "archive" / "rows.jsonl").touch()
    (shared / "latest.jsonl").symlink_to(shared / "archive" / "rows.jsonl")
    (shared / "data" / "train.jsonl").symlink_to("../latest.jsonl")
    found = mounts(run_with(f"data.train=[{shared}/data/train.jsonl]"))
    assert {f"{shared}:{shared}"} < set(found)
    assert not any("archive" in mount for mount in found), "the folder above has it"


def test_the_root_is_never_mounted(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = shared / "data" / "train.jsonl"
    link.symlink_to("/rows.jsonl")
    exists = os.path.exists
    monkeypatch.setattr("os.path.exists", lambda path: path == link or exists(path))  # / is not ours to write
    for named in (link, "/rows.jsonl"):
        found = mounts(run_with(f"data.train=[{named}]"))
        assert "/rows.jsonl:/rows.jsonl" in found
        assert "/:/" not in found


def test_folders_of_published_suites_are_mounted_and_exported(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASFT_DATA_DIR", "../shared/evaldata")
    run = run_with("eval.suites=[medqa]")
    folder = shared / "evaldata"
    assert variables(run) == {"ASFT_DATA_DIR": folder, "HF_HOME": shared.parent / "home"}
    assert f"{folder}:{folder}" in mounts(run)
    assert variables(run_with("eval.suites=[/s.jsonl]")) == {}, "files are named"
    assert "/given:/given" in mounts(run_with("eval.suites=[medqa]", 'cluster.env=["ASFT_DATA_DIR=/given"]'))


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("model.path='/my models/x'", "model.path needs /my models/x in the container"),
        ("data.train=['/a,b/c.jsonl']", "data.train needs /a,b in the container"),
        ("reference.cache_dir='/a:b'", "reference.cache_dir needs /a:b in the container"),
        ('cluster.container_mounts=["/a b:/c"]', "cluster.container_mounts needs /a b in the container"),
        ("cluster.container_image='/my images/a.sqsh'", "cluster.container_image needs /my images/a.sqsh"),
        ("cluster.eval_image='/my images/b.sqsh'", "cluster.eval_image needs /my images/b.sqsh"),
    ],
)
def test_names_that_pyxis_cannot_be_given_are_refused(shared: Path, word: str, named: str) -> None:
    words = [word, "reference=cached"] if "cache_dir" in word else [word]
    with pytest.raises(ConfigError) as caught:
        run_with(*words)
    (only,) = caught.value.violations
    assert only.startswith(named)


def test_a_relative_name_is_refused_for_the_directory_it_is_in(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shared / "my dir").mkdir()
    monkeypatch.chdir(shared / "my dir")
    run_with()
    with pytest.raises(ConfigError, match=r"data\.train needs .*/my dir in the container"):
        run_with("data.train=[a.jsonl]")
