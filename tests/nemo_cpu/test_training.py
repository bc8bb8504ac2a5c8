"""Real training on gloo ranks: the reference, resuming, logits, validation, precision, what a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import VOCAB, RandomTokens
from kept import some_of
from models import load64, read_hf
from ranks import RankGroup
from real_runs import NOT_TIMES, VALID, all_tensors, metrics, settings_of, without_times

from asft_nemo.checkpoint.convert import export_hf
from asft_nemo.checkpoint.dist_read import DistReader
from asft_nemo.checkpoint.verify import verify
from asft_nemo.config.paths import project_dir

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]


def test_logits_equal_transformers(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """Megatron at TP2 x PP2 against transformers in fp64: the worst difference is at most 1e-5 of the largest logit."""
    out = tmp_path / "logits.pt"
    ranks4.run("jobs:megatron_logits", settings=settings_of(model, tmp_path / "run"), out=str(out))
    found_BSV = torch.load(out)
    data = RandomTokens(size=64, sequence_length=32, valid=[32])
    with torch.no_grad():
        expected_BSV = load64(model)(input_ids=torch.stack([data[i]["tokens"] for i in range(4)])).logits
    error = float((found_BSV.double() - expected_BSV).abs().max() / expected_BSV.abs().max())
    print(f"logits at TP2 x PP2 against fp64 transformers: worst difference {error:.1e} of the largest logit")
    assert found_BSV.shape[-1] == VOCAB
    assert error <= 1e-5


@pytest.mark.parametrize("vpp_size", some_of([None, 2], kept=["2"]))
def test_reference_is_frozen_apart_and_exact(
    ranks4: RankGroup, model: Path, tmp_path: Path, vpp_size: int | None
) -> None:
    settings = settings_of(model, tmp_path / "run", trainer__max_steps=2, parallel__vpp_size=vpp_size)
    facts = ranks4.run("reference_jobs:describe_reference", settings=settings, valid=VALID)
    for rank in facts:
        assert rank["parameters"] == rank["policy_parameters"] > 0
        assert rank["buckets_hold"] == rank["policy_parameters"]
        assert (
            rank["shared_with_policy"]
            == rank["in_optimizer"]
            == rank["in_buckets"]
            == rank["with_gradient"]
            == 0
        )
        assert not any(rank["training_mode"])
        assert rank["checksum_before"] == rank["checksum_after"] != rank["policy_checksum"]
    first, second = metrics(tmp_path / "run")
    assert first["kl"] == 0.0
    assert second["kl"] > 0.0
    keys = all_tensors(tmp_path / "run" / "checkpoints" / "latest")
    assert {key.split(".")[0] for key in keys} == {"module", "optimizer"}
    assert not [key for key in keys if "ref" in key]
    model_bytes = sum(value.numel() for key, value in keys.items() if key.startswith("module."))
    assert (
        model_bytes == sum(p.numel() for p in load64(model).parameters()) + 2 * (512 - VOCAB) * 64
    )  # padded rows


def test_resume_is_bit_exact_and_keeps_the_base_as_reference(
    ranks4: RankGroup, model: Path, tmp_path: Path
) -> None:
    """4 steps straight equal 2, a stop, and 2 more: metrics, weights, optimizer state. The KL goes on growing from the base."""
    common = {"trainer__max_steps": 4, "trainer__checkpoint_every": 2, "trainer__keep": "last:2"}
    straight = settings_of(model, tmp_path / "straight", **common)
    ranks4.run("jobs:train_steps", settings=straight, valid=VALID)
    stopped = settings_of(model, tmp_path / "stopped", **common)
    ranks4.run("jobs:train_and_die", settings=stopped, valid=VALID, after_step=3)
    assert (tmp_path / "stopped" / "checkpoints" / "latest").resolve().name == "step_2"
    assert len(metrics(tmp_path / "stopped")) == 3  # the third step's line is written again after the resume
    ranks4.run("jobs:train_steps", settings={**stopped, "trainer.resume": "must"}, valid=VALID)
    expected, found = metrics(tmp_path / "straight"), metrics(tmp_path / "stopped")
    assert without_times(found) == without_times(expected)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    # were the reference the resumed policy, step 3 would start again from a KL of 0
    assert found[2]["kl"] > 0.5 * found[1]["kl"] > 0.0
    one, other = (all_tensors(tmp_path / name / "checkpoints" / "step_4") for name in ("straight", "stopped"))
    assert set(one) == set(other)
    assert [key for key in one if key.startswith("optimizer")]
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_psft_resumes_between_snapshots(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """A stop at step 3 of 5 with a snapshot every second step: the snapshot of step 3's start comes back with the checkpoint."""
    common = {
        "objective__name": "psft",
        "objective__refresh_every": 2,
        "reference__form": "none",
        "parallel__vpp_size": 2,
        "trainer__max_steps": 5,
        "trainer__checkpoint_every": 3,
        "trainer__keep": "last:2",
    }
    straight = settings_of(model, tmp_path / "straight", **common)
    ranks4.run("jobs:train_steps", settings=straight, valid=VALID)
    stopped = settings_of(model, tmp_path / "stopped", **common)
    ranks4.run("jobs:train_and_die", settings=stopped, valid=VALID, after_step=3)
    ranks4.run("jobs:train_steps", settings={**stopped, "trainer.resume": "must"}, valid=VALID)
    expected, found = metrics(tmp_path / "straight"), metrics(tmp_path / "stopped")
    assert without_times(found) == without_times(expected)
    # refreshed at steps 1, 3 and 5: the ratio, and so the weight, is 1 there and moves in between
    assert [line["token_weight"] == pytest.approx(1.0, abs=1e-6) for line in found] == [
        True,
        False,
        True,
        False,
        True,
    ]
    one, other = (all_tensors(tmp_path / name / "checkpoints" / "step_5") for name in ("straight", "stopped"))
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_iw_sft_starts_at_weight_one(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """Policy and reference are the same model at first, so every sequence counts alike; then the weights part."""
    settings = settings_of(model, tmp_path / "run", objective__name="iw_sft", trainer__max_steps=3)
    ranks4.run("jobs:train_steps", settings=settings, valid=VALID)
    weights = [line["token_weight"] for line in metrics(tmp_path / "run")]
    assert weights[0] == 1.0
    assert weights[1] > 1.0
    assert weights[2] > weights[1]


def test_resume_at_another_layout_goes_on(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """A checkpoint of TP2 x PP2 continues at TP1 x PP2 x DP2: the next step's loss agrees to rounding."""
    common = {"trainer__max_steps": 3, "trainer__checkpoint_every": 2, "trainer__keep": "last:2"}
    straight = settings_of(model, tmp_path / "run", **common)
    ranks4.run("jobs:train_steps", settings=straight, valid=VALID)
    lines = metrics(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("step_2")
    moved = {**straight, "parallel.tp_size": 1, "trainer.resume": "must"}
    ranks4.run("jobs:train_steps", settings=moved, valid=VALID)
    assert metrics(tmp_path / "run")[2]["loss"] == pytest.approx(lines[2]["loss"], rel=1e-5)


def test_round_trip_and_verify(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """The imported base exports bit-exactly; a trained checkpoint exports on its own and differs from the base."""
    ranks4.run("jobs:train_steps", settings=settings_of(model, tmp_path / "run"), valid=VALID)
    assert verify(tmp_path / "run" / "base", model).identical
    export_hf(tmp_path / "run" / "base", tmp_path / "again")
    base, again = read_hf(model), read_hf(tmp_path / "again")
    assert set(base) == set(again)
    assert all(torch.equal(base[key], again[key]) for key in base)
    export_hf(tmp_path / "run" / "checkpoints" / "latest", tmp_path / "trained")
    trained = read_hf(tmp_path / "trained")
    assert set(trained) == set(base)
    assert all(trained[key].shape == base[key].shape for key in base)
    assert any(not torch.equal(trained[key], base[key]) for key in base)
    load64(tmp_path / "trained")
    assert DistReader(tmp_path / "run" / "checkpoints" / "latest" / "weights")


def test_validation_adds_to_the_steps_line(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """Validation runs the same reference and loss; 11 examples fill global batches of 8 with fully masked ones."""
    settings = settings_of(
        model, tmp_path / "run", trainer__max_steps=2, trainer__validate_every=2, parallel__vpp_size=2
    )
    settings["parallel.sequence_parallel"] = True
    ranks4.run("jobs:train_steps", settings=settings, valid=VALID, validation=11)
    first, second = metrics(tmp_path / "run")
    assert not [key for key in first if key.startswith("validation_")]
    assert second["validation_kl"] > 0
    assert second["validation_kl_reverse"] is None
    assert second["validation_loss"] == pytest.approx(
        second["validation_weighted_nll"] + 0.1 * second["validation_kl"], rel=1e-5
    )


def test_bf16_trains_and_starts_at_zero_kl(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    ranks4.run(
        "jobs:train_steps",
        settings=settings_of(model, tmp_path / "run", precision="bf16", trainer__max_steps=3),
        valid=VALID,
    )
    lines = metrics(tmp_path / "run")
    assert lines[0]["kl"] == 0.0
    assert lines[2]["kl"] > 0.0
    assert len(lines) == 3


@pytest.mark.long
def test_loss_implementations_agree(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """`loss.implementation` changes how the loss is computed, not what it is."""
    found = {}
    for name in ("fused", "vocab_parallel", "dense"):
        settings = settings_of(model, tmp_path / name, loss__implementation=name, trainer__max_steps=2)
        ranks4.run("jobs:train_steps", settings=settings, valid=VALID)
        found[name] = metrics(tmp_path / name)
    pairs = [
        *zip(found["fused"], found["dense"], strict=True),
        *zip(found["vocab_parallel"], found["dense"], strict=True),
    ]
    for one, other in pairs:
        for key in ("loss", "nll", "weighted_nll", "token_weight", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=2e-5), key
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-4, abs=1e-8)


def test_an_objective_without_reference_builds_none(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    settings = settings_of(model, tmp_path / "run", objective__name="dft", reference__form="none")
    assert ranks4.run("reference_jobs:has_reference", settings=settings, valid=VALID) == [False] * 4
    (line,) = metrics(tmp_path / "run")
    assert line["kl"] is None
    assert line["kl_reverse"] is None


def test_run_folder_and_record(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    settings = settings_of(
        model, tmp_path / "run", trainer__max_steps=3, trainer__checkpoint_every=1, trainer__keep="last:2"
    )
    ranks4.run("jobs:train_steps", settings=settings, valid=VALID)
    folder = tmp_path / "run"
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["objective"]["kl_weight"] == 0.1
    assert record["versions"]["megatron-core"]
    assert sorted(entry.name for entry in (folder / "checkpoints").iterdir()) == [
        "latest",
        "step_2",
        "step_3",
    ]
    assert list((folder / "tensorboard").iterdir())
    expected = {
        "step",
        "loss",
        "nll",
        "weighted_nll",
        "kl",
        "kl_reverse",
        "token_weight",
        "high_weight_share",
        "topk_entropy",
        "grad_norm",
        "lr",
        "tokens",
        "skipped",
        "cache_hit_rate",
        "mfu",
        "memory_bytes",
    }
    assert set(metrics(folder)[0]) == expected | set(NOT_TIMES)
    assert 0.0 <= metrics(folder)[0]["high_weight_share"] <= 1.0
    assert metrics(folder)[0]["topk_entropy"] is None


def own_data(folder: Path, **more: Any) -> dict[str, Any]:
    """Settings of a run on the shipped base and a file of a few examples."""
    file = folder / "train.jsonl"
    file.write_text(
        "".join(json.dumps({"instruction": f"copy {n}:", "response": str(n)}) + "\n" for n in range(40))
    )
    settings = settings_of(
        project_dir() / "assets" / "tiny-base", folder / "run", trainer__max_steps=2, **more
    )
    return {**settings, "data.train": [str(file)], "data.template": "raw", "data.sequence_length": 32}


def two_files(folder: Path, run: str, **more: Any) -> dict[str, Any]:
    """Settings of a run on two files of the same name in two folders; the second has no row in the second step."""
    files = []
    for name, rows in (("copy", range(30)), ("reverse", range(100, 103))):
        (folder / name).mkdir(exist_ok=True)
        files.append(folder / name / "rows.jsonl")
        files[-1].write_text(
            "".join(json.dumps({"instruction": f"{name} {n}:", "response": str(n)}) + "\n" for n in rows)
        )
    settings = settings_of(project_dir() / "assets" / "tiny-base", folder / run, trainer__max_steps=3, **more)
    shape = {"data.template": "raw", "data.sequence_length": 32, "trainer.global_batch_size": 8}
    return {
        **settings,
        **shape,
        "data.train": [str(file) for file in files],
        "data.validation": [str(files[1]), str(files[0]), str(files[1])],
        "trainer.validate_every": 2,
    }


def test_metrics_of_domains(ranks4: RankGroup, tmp_path: Path) -> None:
    """Each file's metrics recombine to the step's; they are the same on all data-parallel ranks and at another layout."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    by_rank = ranks4.run("jobs:means_of_steps", settings=two_files(tmp_path, "tp2"))
    assert by_rank[0] == by_rank[1] == [None] * len(by_rank[0])  # the first pipeline stage knows no loss
    assert by_rank[2] == by_rank[3]
    moved = two_files(tmp_path, "dp2", parallel__tp_size=1, trainer__micro_batch_size=2)
    by_rank = ranks4.run("jobs:means_of_steps", settings=moved)
    assert by_rank[2] == by_rank[3]  # two data-parallel ranks
    lines, moved_lines = metrics(tmp_path / "tp2"), metrics(tmp_path / "dp2")
    both = {"copy/rows", "reverse/rows"}
    assert [set(line["domains"]) for line in lines] == [both, {"copy/rows"}, both]
    for line, other in zip(lines, moved_lines, strict=True):
        domains = line["domains"].values()
        assert sum(values["tokens"] for values in domains) == line["tokens"]
        names = {"nll", "weighted_nll", "kl", "token_weight", "high_weight_share"}
        assert all(set(values) == {"tokens", *names} for values in domains)
        for key in names:
            total = sum(values["tokens"] * values[key] for values in domains)
            assert total / line["tokens"] == pytest.approx(line[key], rel=1e-6, abs=1e-9), key
            for domain, values in other["domains"].items():
                assert values[key] == pytest.approx(line["domains"][domain][key], rel=1e-4, abs=1e-7), key
        assert {name: values["tokens"] for name, values in other["domains"].items()} == {
            name: values["tokens"] for name, values in line["domains"].items()
        }
    assert lines[1]["validation_nll"] > 0.0
    events = EventAccumulator(str(tmp_path / "tp2" / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("nll/copy/rows")] == pytest.approx(
        [line["domains"]["copy/rows"]["nll"] for line in lines]
    )


def test_train_without_our_launcher_opens_the_folder(ranks4: RankGroup, tmp_path: Path) -> None:
    """Ranks that torchrun or NeMo-Run started: run.json, rules and the lock are there all the same."""
    settings = own_data(tmp_path)
    ranks4.run("jobs:train_itself", settings=settings)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["data"]["template"] == "raw"
    assert (tmp_path / "run" / "checkpoints" / "latest" / "context" / "run.json").is_file()
    assert metrics(tmp_path / "run")[0]["kl"] == 0.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reference.form": "adapter_disabled"}, "peft=none has none: set peft=lora"),
        ({"run.world_size": 8}, "4 ranks were started, but run.world_size=8"),
    ],
)
def test_train_without_our_launcher_checks_the_rules(
    ranks4: RankGroup, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    sentences = ranks4.run("jobs:refusal", settings={**own_data(tmp_path), **change})
    assert all(said in sentence for sentence in sentences), sentences
    assert not (tmp_path / "run").exists()


def test_a_gradient_that_is_not_finite_stops_with_a_sentence(ranks4: RankGroup, tmp_path: Path) -> None:
    settings = own_data(tmp_path, optim__lr=1e30, optim__warmup_ratio=0.0)
    sentences = ranks4.run("jobs:refusal", settings=settings)
    assert all("not finite" in sentence for sentence in sentences), sentences


def test_metrics_of_validation_files(ranks4: RankGroup, tmp_path: Path) -> None:
    """Each file's means, weighted by tokens, make up those of all; held against a validation on that file alone."""
    both = two_files(tmp_path, "both")
    files = both["data.train"]
    both |= {"data.validation": files, "trainer.validate_every": 1, "trainer.max_steps": 1}
    ranks4.run("jobs:train_itself", settings=both)
    (line,) = metrics(tmp_path / "both")
    domains = line["validation_domains"]
    assert set(domains) == {"copy/rows", "reverse/rows"}
    tokens = sum(values["tokens"] for values in domains.values())
    for key in ("nll", "weighted_nll", "token_weight", "kl"):
        total = sum(values["tokens"] * values[key] for values in domains.values())
        assert line[f"validation_{key}"] == pytest.approx(total / tokens, rel=1e-6, abs=1e-12), key
    alone = {**both, "data.validation": files[:1], "run.dir": str(tmp_path / "alone")}
    ranks4.run("jobs:train_itself", settings=alone)
    (other,) = metrics(tmp_path / "alone")
    assert "validation_domains" not in other
    assert other["validation_nll"] == pytest.approx(domains["copy/rows"]["nll"], rel=1e-5)


def test_the_best_checkpoint_stays(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """Validated at every step of a run that learns too fast: the best and the latest checkpoint stay, also over a resume."""
    settings = settings_of(
        model,
        tmp_path / "run",
        trainer__max_steps=6,
        trainer__validate_every=1,
        trainer__keep="best:validation_nll",
        optim__lr=0.03,
        optim__warmup_ratio=0.0,
    )
    ranks4.run("jobs:train_steps", settings=settings, valid=VALID, validation=8)
    folder = tmp_path / "run" / "checkpoints"
    values = [line["validation_nll"] for line in metrics(tmp_path / "run")]
    best = 1 + values.index(min(values))
    assert 1 <= best < 6, values
    assert (folder / "best").resolve().name == f"step_{best}"
    assert {entry.name for entry in folder.glob("step_*")} == {f"step_{best}", "step_6"}
    # as if it had been killed right after its best: the later steps are no better, and the best is still known
    (folder / "latest").unlink()
    (folder / "latest").symlink_to(f"step_{best}")
    ranks4.run("jobs:train_steps", settings={**settings, "trainer.resume": "must"}, valid=VALID, validation=8)
    assert [line["validation_nll"] for line in metrics(tmp_path / "run")] == values
    assert (folder / "best").resolve().name == f"step_{best}"
    assert {entry.name for entry in folder.glob("step_*")} == {f"step_{best}", "step_6"}
