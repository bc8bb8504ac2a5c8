"""The reference's forms on real ranks: resident, offloaded and cached agree bit for bit; a cache serves every layout; faults are refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kept import some_of
from models import make_model_with_tokenizer
from ranks import RankGroup
from real_runs import all_tensors, metrics, settings_of, without_times
from safetensors.torch import load_file

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_pp2": {},
    "tp2_pp2_sp": {"parallel.sequence_parallel": True},
    "pp2_vpp2_dp2": {"parallel.tp_size": 1, "parallel.vpp_size": 2},
    "tp2_dp2": {"parallel.pp_size": 1},
    "dp4": {"parallel.tp_size": 1, "parallel.pp_size": 1},
    "tp2_pp2_sp_packed": {
        "parallel.sequence_parallel": True,
        "data.packing": True,
        "data.sequence_length": 64,
    },
    "tp2_cp2_sp_packed": {
        "parallel.pp_size": 1,
        "parallel.cp_size": 2,
        "parallel.sequence_parallel": True,
        "data.packing": True,
        "data.sequence_length": 64,
    },
}
CASES = [("fp32", layout) for layout in LAYOUTS if layout != "dp4"] + [("bf16", "tp2_pp2_sp")]
STEPS = 4
FORM_KEYS = ("cache_hit_rate",)  # say which form it was


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A training file of 20 examples (more than a global batch of 8, so epochs end inside steps) and a validation file."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 20), ("validation", 5)):
        lines = [
            json.dumps({"instruction": f"{name} copy {n}:", "response": str(n) * (1 + n % 4)})
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {name: str(folder / f"{name}.jsonl") for name in ("train", "validation")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_with_tokenizer(tmp_path_factory.mktemp("model") / "base")


def run_settings(model: Path, data: dict[str, str], folder: Path, layout: str, **more: Any) -> dict[str, Any]:
    """A run of four steps with a checkpoint and a validation at the end."""
    settings = settings_of(
        model,
        folder,
        trainer__max_steps=STEPS,
        trainer__validate_every=STEPS,
        **more,
    )
    return {
        **settings,
        "data.train": [data["train"]],
        "data.validation": [data["validation"]],
        "data.template": "raw",
        "data.sequence_length": 32,
        **LAYOUTS[layout],
    }


def compare(one: Path, other: Path) -> None:
    """Metrics, weights and optimizer state of two runs are equal bit for bit."""
    hidden = [
        [
            {key: value for key, value in line.items() if key not in FORM_KEYS}
            for line in without_times(metrics(run))
        ]
        for run in (one, other)
    ]
    assert hidden[0] == hidden[1]
    assert hidden[0][-1]["kl"] > 0
    assert hidden[0][-1]["validation_kl"] > 0
    tensors = [all_tensors(run / "checkpoints" / "latest") for run in (one, other)]
    assert set(tensors[0]) == set(tensors[1])
    assert [key for key in tensors[0] if not torch.equal(tensors[0][key], tensors[1][key])] == []


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize(
    ("precision", "layout"), some_of(CASES, kept=["fp32-tp2_pp2_sp_packed", "fp32-pp2_vpp2_dp2"])
)
def test_forms_agree_bit_for_bit(
    ranks4: RankGroup, model: Path, data: dict[str, str], tmp_path: Path, layout: str, precision: str
) -> None:
    """Four steps of resident, offloaded, cached by a job, and cached by the first epoch: equal metrics, weights, optimizer."""
    resident = run_settings(model, data, tmp_path / "resident", layout, precision=precision)
    ranks4.run("jobs:train_itself", settings=resident)
    assert metrics(tmp_path / "resident")[0]["kl"] == 0.0
    cost = summary(tmp_path / "resident")
    assert cost["reference_device_bytes"] == cost["policy_parameter_bytes"]

    offloaded = {**resident, "reference.form": "offloaded", "run.dir": str(tmp_path / "offloaded")}
    ranks4.run("jobs:train_itself", settings=offloaded)
    compare(tmp_path / "resident", tmp_path / "offloaded")
    moved = summary(tmp_path / "offloaded")
    assert moved["reference_host_bytes"] + moved["reference_device_bytes"] >= cost["reference_device_bytes"]
    assert moved["reference_device_bytes"] < 0.5 * cost["reference_device_bytes"]

    cached = {**resident, "reference.form": "cached", "run.dir": str(tmp_path / "cached")}
    ranks4.run("reference_jobs:cache_itself", settings=cached, repair=False)
    for steps in ranks4.run("reference_jobs:reading_ahead", settings=cached):
        assert len(steps["told"]) == len(steps["taken"]) == STEPS
        assert steps["told"][:-1] == steps["taken"][1:]
    compare(tmp_path / "resident", tmp_path / "cached")
    assert [line["cache_hit_rate"] for line in metrics(tmp_path / "cached")] == [1.0] * STEPS

    filling = {**cached, "reference.fill": "first_epoch", "run.dir": str(tmp_path / "filling")}
    ranks4.run("jobs:train_itself", settings=filling)
    compare(tmp_path / "resident", tmp_path / "filling")
    rates = [line["cache_hit_rate"] for line in metrics(tmp_path / "filling")]
    assert rates[0] == 0.0
    assert rates[-1] == 1.0  # step 4 belongs to the second epoch


def differences(one: Path, other: Path) -> dict[str, float]:
    """Euclidean norms of the differences between two runs: of what every step logged, and of all weights after the last."""
    lines = list(zip(metrics(one), metrics(other), strict=True))
    weights = [all_tensors(run / "checkpoints" / "latest") for run in (one, other)]
    apart = [
        (weights[0][key].double() - weights[1][key].double()).norm().item()
        for key in weights[0]
        if key.startswith("module.") and weights[0][key].is_floating_point()
    ]
    logged = {key: math.hypot(*(a[key] - b[key] for a, b in lines)) for key in ("loss", "nll", "kl")}
    return {**logged, "weights": math.hypot(*apart)}


@pytest.mark.long
def test_a_cache_serves_another_layout(
    ranks4: RankGroup, model: Path, data: dict[str, str], tmp_path: Path
) -> None:
    """TP1 x PP1 and TP2 x PP2, each reading what the other wrote.

    A cache holds what a resident reference computes at the layout that wrote it, bit for bit (the test above), so its rows are off by
    what a resident reference is off between the two layouts, measured here on the rows. Trained with, that is rounding: runs
    differ by no more than twice what runs with a resident reference differ between the layouts.
    """
    # Adam divides by the gradient's size, which turns rounding into steps of full length; a large eps keeps updates in proportion
    layouts = {
        name: run_settings(model, data, tmp_path / name, name, optim__eps=1e-2) for name in ("dp4", "tp2_pp2")
    }
    for name, settings in layouts.items():
        ranks4.run("jobs:train_itself", settings=settings)
        cache = {"reference.form": "cached", "reference.cache_dir": str(tmp_path / f"cache_{name}")}
        ranks4.run("reference_jobs:cache_itself", settings={**settings, **cache}, repair=False)
    rows = [stored_rows(tmp_path / f"cache_{name}") for name in layouts]
    assert rows[0].keys() == rows[1].keys()
    largest = max(float(row.abs().max()) for row in rows[0].values())
    apart = max(float((row - rows[1][key]).abs().max()) for key, row in rows[0].items())
    print(f"stored rows: {apart / largest:.1e} of the largest entry apart")
    assert 0 < apart < 1e-5 * largest
    allowed = differences(tmp_path / "dp4", tmp_path / "tp2_pp2")
    for written, read in (("dp4", "tp2_pp2"), ("tp2_pp2", "dp4")):
        folder = tmp_path / f"{written}_{read}"
        cached = {
            **layouts[read],
            "reference.form": "cached",
            "reference.cache_dir": str(tmp_path / f"cache_{written}"),
            "run.dir": str(folder),
        }
        ranks4.run("jobs:train_itself", settings=cached)
        found = differences(folder, tmp_path / read)
        print(f"written at {written}, read at {read}: {found}; resident at both: {allowed}")
        assert all(found[key] <= 2 * allowed[key] for key in allowed)


def stored_rows(cache: Path) -> dict[tuple[int, int], torch.Tensor]:
    """(example, place among its stored tokens) -> hidden state, of all shards."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    for file in cache.glob("rows-*.safetensors"):
        shard = load_file(file)
        parts = shard["rows"].split(shard["row_counts"].tolist())
        for sample, part in zip(shard["sample_ids"].tolist(), parts, strict=True):
            found.update({(sample, place): row for place, row in enumerate(part)})
    return found


@pytest.mark.parametrize("layout", some_of(["tp2_pp2", "pp2_vpp2_dp2"], kept=["tp2_pp2"]))
def test_larger_micro_batches_of_the_reference(
    ranks4: RankGroup, model: Path, data: dict[str, str], tmp_path: Path, layout: str
) -> None:
    """`reference.micro_batch_size`: the same rows in larger products, so that only rounding differs."""
    alike = run_settings(model, data, tmp_path / "alike", layout)
    larger = {**alike, "reference.micro_batch_size": 4, "run.dir": str(tmp_path / "larger")}
    if (
        layout == "pp2_vpp2_dp2"
    ):  # virtual stages want two reference micro batches a step on each data-parallel rank
        alike["trainer.global_batch_size"] = larger["trainer.global_batch_size"] = 16
    passes = [
        ranks4.run("reference_jobs:reference_micro_batches", settings=one)[0][:STEPS]
        for one in (alike, larger)
    ]
    assert passes == [[8] * STEPS, [2] * STEPS]
    found = differences(tmp_path / "alike", tmp_path / "larger")
    print(f"{layout}: {found}")
    assert all(value < 1e-4 for value in found.values())


def test_a_prepass_moves_no_bit_of_the_policy(
    ranks4: RankGroup, model: Path, data: dict[str, str], tmp_path: Path
) -> None:
    """sft with a reference computed beside it and thrown away is sft; asft without weight on the divergence is dft."""
    steps = 2
    runs = {
        name: {
            "objective.name": name,
            "objective.kl_weight": 0.0,
            "trainer.max_steps": steps,
            "trainer.validate_every": steps,
        }
        for name in ("sft", "dft", "asft")
    }
    for name, objective in runs.items():
        settings = {**run_settings(model, data, tmp_path / name, "tp2_pp2_sp"), **objective}
        ranks4.run("jobs:train_itself", settings=settings)
    beside = {**run_settings(model, data, tmp_path / "beside", "tp2_pp2_sp"), **runs["sft"]}
    computed = ranks4.run("reference_jobs:train_with_a_reference_beside", settings=beside)
    assert all(count >= steps for count in computed)
    assert bits(tmp_path / "sft") == bits(tmp_path / "beside")
    assert bits(tmp_path / "dft") == bits(tmp_path / "asft")
    assert bits(tmp_path / "sft") != bits(tmp_path / "dft")


def bits(run: Path) -> tuple[list[tuple[float, float]], dict[str, bytes]]:
    """What a trajectory is made of: loss and gradient norm of every step, and every tensor of the checkpoint."""
    tensors = all_tensors(run / "checkpoints" / "latest")
    return (
        [(line["loss"], line["grad_norm"]) for line in metrics(run)],
        {key: value.contiguous().view(torch.uint8).numpy().tobytes() for key, value in tensors.items()},
    )


def test_a_cache_that_does_not_fit_is_refused(
    ranks4: RankGroup, model: Path, data: dict[str, str], tmp_path: Path
) -> None:
    """Another base, size, tokenizer, template, data file or sequence length, and a cache that is not whole: the sentence names the field
    or what is missing, and the cache stays as it was.
    """
    cached = {
        **run_settings(model, data, tmp_path / "run", "tp2_pp2"),
        "reference.form": "cached",
        "reference.cache_dir": str(tmp_path / "cache"),
    }
    ranks4.run("reference_jobs:cache_itself", settings=cached, repair=False)
    before = {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    other = tmp_path / "other.jsonl"
    other.write_text(Path(data["train"]).read_text().replace("copy", "Copy"))
    bases = {name: tmp_path / name for name in ("base", "hidden_size", "vocab_size", "tokenizer")}
    make_model_with_tokenizer(bases["base"], seed=5)
    make_model_with_tokenizer(bases["hidden_size"], hidden_size=128)
    make_model_with_tokenizer(bases["vocab_size"], more_vocab=128)
    shutil.copytree(model, bases["tokenizer"])
    file = bases["tokenizer"] / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(tokenizer))
    for field, change in (
        ("data", {"data.train": [str(other)]}),
        ("sequence_length", {"data.sequence_length": 24}),
        (
            "template",
            {"data.template": "alpaca", "data.on_too_long": "truncate", "data.sequence_length": 128},
        ),
        *((field, {"model.path": str(base)}) for field, base in bases.items()),
    ):
        settings = {**cached, **change, "run.dir": str(tmp_path / f"run_{field}")}
        said = set(ranks4.run("jobs:refusal", settings=settings))
        assert len(said) == 1, said
        assert re.search(rf"for another run: .*\b{field} \(", said.pop())
    assert {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()} == before
    shard = next((tmp_path / "cache").glob("rows-*"))
    shard.rename(tmp_path / shard.name)
    for sentence in ranks4.run("jobs:refusal", settings={**cached, "run.dir": str(tmp_path / "run_part")}):
        assert re.search("lacks .* of 25 examples: finish it", sentence)
