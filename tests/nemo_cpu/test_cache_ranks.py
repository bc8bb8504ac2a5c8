"""What the ranks of a cache's job, and of a run that fills one, do together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from models import make_model_with_tokenizer
from ranks import RankGroup
from real_runs import settings_of
from safetensors.numpy import load_file

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


def test_the_ranks_of_a_pipeline_compute_the_same_whatever_each_would_find(
    ranks2: RankGroup, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Stages that look at different times would pair one example's tokens with another's hidden states, or wait for ever."""
    caches = [tmp_path / name for name in ("alone", "amid")]
    for cache, job in zip(
        caches, ("reference_jobs:cache_itself", "cache_jobs:cache_amid_another_job"), strict=True
    ):
        arguments = {"repair": False} if job.endswith("itself") else {}
        given = {**settings, "reference.cache_dir": str(cache)}
        ranks2.run(job, timeout=120, settings=given, **arguments)
    alone, amid = (rows(cache) for cache in caches)
    assert sorted(alone) == list(range(20))
    assert amid == alone


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
