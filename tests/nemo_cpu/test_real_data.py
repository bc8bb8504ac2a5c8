"""GSM8K and MedMCQA's explanations, prepared and trained at TP2 x PP2, packed and not."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import run_config
from kept import some_of
from ranks import RankGroup
from real_runs import metrics, settings_of

from asft_nemo.cli import main
from asft_nemo.config.paths import project_dir
from asft_nemo.data import PackedDataset, prepare

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

BASE = project_dir() / "assets" / "tiny-base"
LENGTH = 768
FILES = {"gsm8k": "math/gsm8k_train.jsonl", "medmcqa": "medical/medmcqa_test.jsonl"}
ROWS = {"gsm8k": (7473, 0), "medmcqa": (4183, 1977)}  # rows, and those without an explanation
SKIP = {"data.on_bad_row": "skip", "data.max_bad_rows": 2000}
SHOWN = 12  # rows of the run that takes all of them in every step
SAME = ("loss", "nll", "weighted_nll", "kl", "token_weight", "high_weight_share", "grad_norm")


def settings(files: list[Path], folder: Path, **more: Any) -> dict[str, Any]:
    given = {"data.train": [str(file) for file in files], "data.sequence_length": LENGTH, **SKIP}
    return {**settings_of(BASE, folder, trainer__max_steps=2, optim__lr=1e-3), **given, **more}


def prepared(file: Path, out: Path) -> Path:
    words = [f"{key}={value}" for key, value in SKIP.items()]
    assert main(["data", "prepare", str(file), *words, f"model.path={BASE}", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("name", some_of(FILES, kept=["medmcqa"]))
def test_the_prepared_file_trains_packed_and_not(
    name: str, ranks4: RankGroup, data_dir: Path, tmp_path: Path
) -> None:
    """The whole file: the prepared form holds the file's own examples, and trains, one example a row or several."""
    file = data_dir / FILES[name]
    plain = settings([prepared(file, tmp_path / "prepared")], tmp_path / "plain_run")
    one, other = (
        prepare(run_config({**plain, "data.train": [str(entry)]}), tokenizer_dir=BASE)
        for entry in (file, tmp_path / "prepared")
    )
    assert one.fingerprint == other.fingerprint
    assert (other.train.report.rows, len(other.train.report.bad)) == ROWS[name]
    assert other.train.sample_ids.tolist() == one.train.sample_ids.tolist()
    for index in range(0, len(one.train), 101):
        assert all(torch.equal(value, one.train[index][key]) for key, value in other.train[index].items())
    packed = {**plain, "data.packing": True, "run.dir": str(tmp_path / "packed_run")}
    for run in (plain, packed):
        ranks4.run("jobs:train_itself", settings=run, timeout=200)
        first, second = metrics(Path(run["run.dir"]))
        assert first["kl"] == 0.0 < second["kl"]


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_packed_steps_are_the_steps_of_their_examples(
    name: str, ranks4: RankGroup, data_dir: Path, tmp_path: Path
) -> None:
    """Steps that take all of a dozen examples: whether rows hold one or several changes no metric but by rounding."""
    usable = (line for line in (data_dir / FILES[name]).open() if json.loads(line).get("exp", "") is not None)
    file = tmp_path / "some.jsonl"
    file.write_text("".join(islice(usable, SHOWN)))
    plain = settings(
        [file], tmp_path / "plain", **{"data.on_too_long": "truncate", "trainer.global_batch_size": SHOWN}
    )
    packed = {**plain, "data.packing": True, "run.dir": str(tmp_path / "packed")}
    data = prepare(run_config(packed), tokenizer_dir=BASE).train
    assert isinstance(data, PackedDataset)
    assert data.report.kept == SHOWN > len(data)
    packed["trainer.global_batch_size"] = len(data)
    for run in (plain, packed):
        ranks4.run("jobs:train_itself", settings=run, timeout=240)
    for one, other in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "packed"), strict=True):
        assert one["tokens"] == other["tokens"] > 0
        for key in SAME:
            assert one[key] == pytest.approx(other[key], rel=2e-4 if key == "kl" else 2e-5), key
