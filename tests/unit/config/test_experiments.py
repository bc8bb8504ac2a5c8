"""Experiments are the paper's rows: this table is written from the paper, not from conf/."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
from omegaconf import OmegaConf

from asft_nemo.config.load import compose, known_options
from asft_nemo.config.paths import project_dir
from asft_nemo.config.recipes import recipe_model
from asft_nemo.config.schema import RunConfig, walk

EXPERIMENTS = project_dir() / "conf" / "experiment"


class Settings(NamedTuple):
    """One column of the paper's table of settings."""

    max_length: int
    global_batch: int
    lr: float
    epochs: int


MEDICAL, MATH, CODE = Settings(512, 64, 2e-5, 3), Settings(2048, 256, 5e-5, 1), Settings(512, 64, 2e-5, 2)
MEDICAL_LORA = MEDICAL._replace(lr=5e-4)


class Row(NamedTuple):
    """A row of the paper's tables, or one of the three runs beside them."""

    settings: Settings
    model: str
    train: str
    method: str = "asft"
    kl_weight: float = 0.05
    lora: tuple[int, int] | None = None  # rank, alpha
    max_steps: int | None = None
    on_too_long: str = "drop"


ROWS_OF = {
    "medical": "data/train/train_medmcqa_alpaca_{}.jsonl",
    "math": "data/train/numina_cot_{}.jsonl",
    "code": "data/train/magicoder_evol_{}.jsonl",
}
HUB = {
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "llama2_70b": "meta-llama/Llama-2-70b-hf",
    "qwen25_1p5b": "Qwen/Qwen2.5-1.5B",
    "qwen25_7b": "Qwen/Qwen2.5-7B",
    "qwen25_32b": "Qwen/Qwen2.5-32B",
    "qwen25_72b": "Qwen/Qwen2.5-72B",
}
SIZES, METHODS = ("10k", "30k", "100k"), ("asft", "sft", "dft", "sft_kl", "iw_sft")
FULL = [  # domain, settings, model, sizes, methods
    ("medical", MEDICAL, "llama2_7b", SIZES, METHODS),
    *(("medical", MEDICAL, model, SIZES[:1], METHODS[:3])
      for model in ("llama2_70b", "qwen25_7b", "qwen25_32b", "qwen25_72b")),
    ("math", MATH, "qwen25_7b", SIZES, METHODS),
    ("code", CODE, "llama2_7b", SIZES[:1], METHODS),
]  # fmt: skip


def rows() -> dict[str, Row]:
    """Every experiment by the name it must have."""
    found = {
        "_".join([domain, model, *([size] if size != "10k" else []), *([method] if method != "asft" else [])]): Row(
            settings, model, ROWS_OF[domain].format(size), method
        )
        for domain, settings, model, sizes, methods in FULL
        for size, method in itertools.product(sizes, methods)
    }  # fmt: skip
    for model in ("llama2_7b", "qwen25_7b"):
        found[f"medical_{model}_lora"] = Row(
            MEDICAL_LORA, model, ROWS_OF["medical"].format("10k"), lora=(8, 16)
        )
    found["full"] = Row(
        MEDICAL_LORA, "qwen25_1p5b", ROWS_OF["math"].format("10k"), lora=(8, 16), on_too_long="truncate"
    )
    found["quick"] = found["full"]._replace(max_steps=200)
    found["paper"] = Row(
        MATH, "qwen25_7b", ROWS_OF["math"].format("100k"), lora=(32, 64), on_too_long="truncate"
    )
    anchored = {name: row for name, row in found.items() if row.method in ("asft", "sft_kl")}
    return found | {f"{name}_kl003": row._replace(kl_weight=0.03) for name, row in anchored.items()}


def run_of(name: str) -> RunConfig:
    return compose([f"experiment={name}", "model.path=nowhere"], check_inputs=False)


def test_there_is_one_file_for_each_row() -> None:
    assert set(known_options("experiment")) - {"tiny", "tiny_gsm8k"} == set(rows())


@pytest.mark.parametrize("name", rows())
def test_an_experiment_is_its_row(name: str) -> None:
    row, run = rows()[name], run_of(name)
    found: dict[str, Any] = {
        "max_length": run.data.sequence_length,
        "global_batch": run.trainer.global_batch_size,
        "lr": run.optim.lr,
        "epochs": run.trainer.epochs,
    }
    assert found == row.settings._asdict()
    assert (run.optim.schedule, run.optim.warmup_ratio) == ("cosine", 0.1)
    assert (run.objective.name, run.objective.kl_weight, run.objective.kl_direction) == (
        row.method,
        row.kl_weight,
        "forward",
    )
    assert run.data.train == (row.train,)
    assert run.data.on_too_long == row.on_too_long
    assert run.trainer.max_steps == row.max_steps
    assert recipe_model(run.recipe) == HUB[row.model]
    assert (run.experiment, run.precision, run.data.packing) == (name, "bf16", False)
    reads = row.method not in ("sft", "dft")
    if row.lora is None:
        assert (run.peft.name, run.reference.form) == ("none", "resident" if reads else "none")
    else:
        assert (run.peft.name, run.peft.rank, run.peft.alpha, run.peft.dropout) == ("lora", *row.lora, 0.05)
        assert run.reference.form == "adapter_disabled"


def leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.mark.parametrize("name", known_options("experiment"))
def test_a_file_says_what_it_is_and_nothing_twice(name: str) -> None:
    """A comment first, and no value that what it is made from has already."""
    text = (EXPERIMENTS / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# "), "the first line a reader sees says what it is"
    body = OmegaConf.to_container(OmegaConf.load(EXPERIMENTS / f"{name}.yaml"))
    assert isinstance(body, dict)
    parents = [entry for entry in body.pop("defaults") if isinstance(entry, str) and entry != "_self_"]
    for parent in parents:
        before = dict(walk(run_of(parent)))
        assert [key for key, value in leaves(body).items() if before[key] == value] == []


def test_the_tiny_run_needs_nothing_from_outside() -> None:
    run = compose(["experiment=tiny"], check_inputs=False)
    assert all(
        project_dir() in path.parents for path in map(type(EXPERIMENTS), (*run.data.train, *run.eval.suites))
    )
    compose(["experiment=tiny", "cluster=slurm_sandbox"], launched=True)  # files and sizes are there
