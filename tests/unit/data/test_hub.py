"""Datasets of the hub: read from the cache of `datasets`, fetched where they are not there, told in one sentence where they cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asft_nemo.config.hub_ids import HubId, hub_id
from asft_nemo.config.schema import FieldsConfig
from asft_nemo.data import Record, read_records
from asft_nemo.data.files import expand
from asft_nemo.data.hub import hub_files
from asft_nemo.errors import DataError

datasets = pytest.importorskip("datasets")
ROWS = [{"question": f"add {i} and 1", "answer": f"{i + 1}"} for i in range(30)]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("openai/gsm8k", HubId("openai/gsm8k", None, "train")),
        ("openai/gsm8k:test", HubId("openai/gsm8k", None, "test")),
        ("openai/gsm8k:main:train", HubId("openai/gsm8k", "main", "train")),
        ("owner/name.v1-2", HubId("owner/name.v1-2", None, "train")),
        ("data/rows.jsonl", None),
        ("data/rows.jsonl.gz", None),
        ("data/deep/rows", None),
        ("gsm8k", None),
        ("./gsm8k", None),
        ("/abs/gsm8k", None),
        ("data/*", None),
        ("a/b:c:d:e", None),
        ("a/b:train[:10%]", None),
    ],
)
def test_what_has_the_form_of_an_id(name: str, found: HubId | None) -> None:
    assert hub_id(name) == found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of `datasets`, and no network."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets, "load_dataset", no_network)
    monkeypatch.setattr("asft_nemo.data.hub.reach_hub", lambda endpoint: None)
    monkeypatch.chdir(tmp_path)
    hub_files.cache_clear()
    yield folder
    hub_files.cache_clear()


def no_network(*args: Any, **settings: Any) -> Any:
    raise ConnectionError("Couldn't reach the Hub")


def fill(cache: Path, configuration: str) -> None:
    """What datasets.load_dataset("openai/gsm8k", configuration) leaves in the cache, made of local files by datasets itself."""
    source = cache.parent / f"{configuration}.jsonl"
    source.write_text("".join(json.dumps({**row, "from": configuration}) + "\n" for row in ROWS))
    made = cache.parent / "made"
    builder = datasets.load_dataset_builder(
        "json", data_files={"train": str(source), "test": str(source)}, cache_dir=str(made)
    )
    builder.download_and_prepare()
    target = cache / "openai___gsm8k" / configuration / "0.0.0" / "0123abcd"
    shutil.copytree(builder.cache_dir, target)
    for path in target.glob("json-*.arrow"):
        path.rename(target / path.name.replace("json-", "gsm8k-"))
    info = json.loads((target / "dataset_info.json").read_text())
    info.update(config_name=configuration, dataset_name="gsm8k")
    (target / "dataset_info.json").write_text(json.dumps(info))
    shutil.rmtree(made)


def questions(name: str) -> list[str]:
    found = [record for record in read_records([name], FieldsConfig()) if isinstance(record, Record)]
    return [str(record.conversation.messages[0]["content"]) for record in found]


def test_a_cached_dataset_is_read_without_the_network(cache: Path) -> None:
    fill(cache, "main")
    expected = [row["question"] for row in ROWS]
    for name in ("openai/gsm8k", "openai/gsm8k:test", "openai/gsm8k:main:train"):
        assert questions(name) == expected
    assert [path.name for path in expand("openai/gsm8k:main:test")] == ["gsm8k-test.arrow"]


def test_an_existing_path_wins(cache: Path, tmp_path: Path) -> None:
    fill(cache, "main")
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    (tmp_path / "openai" / "gsm8k" / "own.jsonl").write_text(json.dumps({"question": "mine", "answer": "x"}))
    assert questions("openai/gsm8k") == ["mine"]


def test_one_of_several_configurations_must_be_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(cache, "main")
    fill(cache, "socratic")
    monkeypatch.setattr(datasets, "load_dataset", no_configuration)
    assert len(questions("openai/gsm8k:socratic:train")) == len(ROWS)
    with pytest.raises(DataError, match=r"Config name is missing.*owner/name:configuration:split"):
        expand("openai/gsm8k")
    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(DataError, match=r"configurations in the cache: .*socratic"):
        expand("openai/gsm8k")


def no_configuration(*args: Any, **settings: Any) -> Any:
    raise ValueError("Config name is missing.\nPlease pick one among the available configs")


def test_offline_and_not_cached_is_one_sentence(cache: Path) -> None:
    with pytest.raises(DataError) as caught:
        expand("openai/gsm8k:main:train")
    assert "\n" not in str(caught.value)
    assert "openai/gsm8k:main:train is no file (looked in " in str(caught.value)
    assert (
        f"is not in the cache of datasets ({cache}: Couldn't find cache for openai/gsm8k for config 'main'), and the hub"
        in str(caught.value)
    )


def test_what_is_not_cached_is_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def fetch(repo: str, configuration: str | None, *, split: str, trust_remote_code: bool) -> Any:
        asked.append((repo, configuration, split, trust_remote_code))
        fill(cache, str(configuration))
        return datasets.Dataset.from_file(
            str(cache / "openai___gsm8k" / str(configuration) / "0.0.0" / "0123abcd" / f"gsm8k-{split}.arrow")
        )

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    first = expand("openai/gsm8k:main:train")
    hub_files.cache_clear()  # as another process
    assert expand("openai/gsm8k:main:train") == first
    assert asked == [("openai/gsm8k", "main", "train", False)]


def test_a_mistyped_path_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_id("data/gsm8k") is None
    assert hub_id("openai/gsm8k") is not None
