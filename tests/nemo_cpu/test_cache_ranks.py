"""What the ranks of a cache's job, and of a run that fills one, do together."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jobs import run_config
from models import make_model_with_tokenizer
from ranks import RankGroup
from real_runs import settings_of
from safetensors.numpy import load_file

from asft_nemo.errors import CacheError
from asft_nemo.nemo.cache import first_epochs_share, open_with_room
from asft_nemo.reference.cache_shard import HEADER_BYTES
from asft_nemo.reference.cache_store import CacheIdentity, CacheReader, CacheWriter, open_or_create

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run at PP2 on 20 examples whose reference is a cache."""
    folder = tmp_path_factory.mktemp("run")
    lines = [json.dumps({"instruction": f"copy {n}:", "response": str(n) * (1 + n % 4)}) for n in range(20)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return {
        **settings_of(make_model_with_tokenizer(folder / "model"), folder / "run"),
        "run.world_size": 2,
        "parallel.tp_size": 1,
        "data.train": [str(folder / "train.jsonl")],
        "data.template": "raw",
        "reference.form": "cached",
    }


def rows(cache: Path) -> dict[int, bytes]:
    """Example -> its stored hidden states."""
    found: dict[int, bytes] = {}
    for file in cache.glob("rows-*.safetensors"):
        shard = load_file(file)
        start = 0
        for sample, count in zip(shard["sample_ids"].tolist(), shard["row_counts"].tolist(), strict=True):
            found[sample] = shard["rows"][start : start + count].tobytes()
            start += count
    return found


@pytest.fixture(scope="module")
def written(ranks2: RankGroup, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cache that nothing disturbed; nobody writes into it."""
    cache = tmp_path_factory.mktemp("written") / "cache"
    given = {**settings, "reference.cache_dir": str(cache)}
    ranks2.run("reference_jobs:cache_itself", timeout=120, settings=given, repair=False)
    assert sorted(rows(cache)) == list(range(20))
    return cache


def test_the_ranks_of_a_pipeline_compute_the_same_whatever_each_would_find(
    ranks2: RankGroup, settings: dict[str, Any], written: Path, tmp_path: Path
) -> None:
    """Stages that look at different times would pair one example's tokens with another's hidden states, or wait for ever."""
    given = {**settings, "reference.cache_dir": str(tmp_path / "cache")}
    ranks2.run("cache_jobs:cache_amid_another_job", timeout=120, settings=given)
    assert rows(tmp_path / "cache") == rows(written)


def test_a_job_repairs_and_computes_again(
    ranks2: RankGroup, settings: dict[str, Any], written: Path, tmp_path: Path
) -> None:
    """A damaged file is set aside, and what it held is there again, bit for bit."""
    cache = tmp_path / "cache"
    shutil.copytree(written, cache)
    (shard,) = cache.glob("rows-*.safetensors")
    raw = bytearray(shard.read_bytes())
    raw[HEADER_BYTES] ^= 1
    shard.write_bytes(raw)
    given = {**settings, "reference.cache_dir": str(cache)}
    ranks2.run("reference_jobs:cache_itself", timeout=120, settings=given, repair=True)
    assert shard.with_name(f"{shard.name}.damaged").read_bytes() == bytes(raw)
    assert rows(cache) == rows(written)


def test_a_first_epoch_that_would_fill_the_disk_does_not_begin(
    ranks2: RankGroup, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Every rank says so, before the first step."""
    given = {
        **settings,
        "reference.cache_dir": str(tmp_path / "cache"),
        "reference.fill": "first_epoch",
        "run.dir": str(tmp_path / "run"),
    }
    said = set(ranks2.run("cache_jobs:refusal_on_a_small_disk", timeout=120, settings=given, free=1000))
    assert len(said) == 1, said
    assert re.search(r"/cache needs .* GB more where 1e-06 GB are free: make room, or set ref", said.pop())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not rows(tmp_path / "cache")


def test_a_run_shorter_than_an_epoch_asks_for_the_room_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_config(settings_of_repair(tmp_path / "cache") | {"trainer.global_batch_size": 2})
    examples = SimpleNamespace(sample_ids=np.arange(8), learned_tokens=lambda ids: 1000 * len(ids))
    data: Any = SimpleNamespace(train=examples, validation=None)
    half = 4000 * (IDENTITY.row_bytes + 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=half))
    with pytest.raises(CacheError, match="make room"):
        open_with_room(run, IDENTITY, data)
    assert len(open_with_room(run, IDENTITY, data, share=0.5)) == 8
    with pytest.raises(CacheError, match="make room"):
        open_with_room(run, IDENTITY, data, share=0.51)


@pytest.mark.parametrize(("steps", "share"), [(1, 0.25), (3, 0.75), (4, 1.0), (100, 1.0)])
def test_what_a_first_epoch_comes_by(steps: int, share: float, tmp_path: Path) -> None:
    run = run_config(settings_of_repair(tmp_path) | {"trainer.global_batch_size": 2})
    data: Any = SimpleNamespace(train=range(8), max_steps=steps)
    assert first_epochs_share(run, data) == share


IDENTITY = CacheIdentity(
    base="b",
    tokenizer="t",
    template="x",
    data="d",
    sequence_length=16,
    hidden_size=8,
    vocab_size=10,
    num_samples=8,
    dtype="bf16",
    precision="bf16",
)


def made_up_cache(directory: Path) -> list[Path]:
    """Eight examples, each in a shard of its own, which are returned; in the third and the sixth a byte is wrong."""
    open_or_create(directory, IDENTITY, written_by={})
    with CacheWriter(directory, 0, IDENTITY, shard_bytes=1) as writer:
        for sample in range(8):
            writer.add(sample, [0, 1], torch.full((2, 8), sample, dtype=torch.bfloat16))
    shards = sorted(directory.glob("rows-*.safetensors"))
    for shard in (shards[2], shards[5]):
        raw = bytearray(shard.read_bytes())
        raw[HEADER_BYTES] ^= 1
        shard.write_bytes(raw)
    return shards


def test_every_rank_checks_a_part_of_a_cache_that_is_repaired(ranks2: RankGroup, tmp_path: Path) -> None:
    """Alone, one rank would keep the others waiting for longer than they do where a cache is large."""
    given = {"identity": asdict(IDENTITY), "settings": settings_of_repair(tmp_path / "cache")}
    shards = made_up_cache(tmp_path / "cache")
    names = [shard.name for shard in shards]
    (tmp_path / "cache" / "manifest.json").write_text("")
    said = "the checksum of sample {}, token offset 0 does not match"
    found = ranks2.run("cache_jobs:repair", timeout=60, **given)
    assert found[0]["checked"] == [*names, *names[0::2]]  # all for whose they are, as there is no manifest
    assert found[1]["checked"] == names[1::2]
    for one in found:
        assert one["damaged"] == [[names[2], said.format(2)], [names[5], said.format(5)]]
        assert one["rewritten"]
    left = {path.name for path in (tmp_path / "cache").glob("rows-*")}
    aside = {f"{names[2]}.damaged", f"{names[5]}.damaged"}
    assert left == {*names, *aside} - {names[2], names[5]}
    with CacheReader(tmp_path / "cache", IDENTITY) as reader:
        assert reader.missing(list(range(8))) == [2, 5]


def test_a_repair_that_one_rank_cannot_go_on_with_keeps_what_it_found(
    ranks2: RankGroup, tmp_path: Path
) -> None:
    """All ranks say the same, and the next repair has less to do."""
    given = {"identity": asdict(IDENTITY), "settings": settings_of_repair(tmp_path / "cache")}
    shards = made_up_cache(tmp_path / "cache")
    found = ranks2.run("cache_jobs:repair", timeout=60, refused=shards[7].name, **given)
    (said,) = {one["said"] for one in found}
    assert re.search(rf"{shards[7]} cannot be read \(Input/output error\), which says nothing", said)
    assert [shard.exists() for shard in shards] == [number not in (2, 5) for number in range(8)]
    for one in ranks2.run("cache_jobs:repair", timeout=60, **given):
        assert one["damaged"] == []
        assert len(one["checked"]) == 3


def settings_of_repair(cache: Path) -> dict[str, Any]:
    """Of two ranks; no model is read."""
    return {
        **settings_of(cache / "no model", cache / "no run"),
        "run.world_size": 2,
        "parallel.tp_size": 1,
        "parallel.pp_size": 1,
        "reference.cache_dir": str(cache),
    }
