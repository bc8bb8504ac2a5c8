"""NaN and infinities on real ranks: what the sentence names, what a skipped step leaves alone, and that nobody hangs."""

from __future__ import annotations

import json
import re
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from kept import some_of
from ranks import RankGroup
from real_runs import alarms_of, all_tensors, metrics, without_times

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow, pytest.mark.timeout(900)]

VALID = [5, 9, 32, 1, 17, 3, 2, 20]
JOB = "nonfinite_jobs:poisoned"
LIMIT = 300  # seconds; a run takes 5 on an idle machine


def settings_of(
    model: Path, folder: Path, *, tp: int = 1, pp: int = 1, world: int, **more: Any
) -> dict[str, Any]:
    return {
        "parallel.tp_size": tp,
        "parallel.pp_size": pp,
        "run.world_size": world,
        "objective.name": "asft",
        "objective.kl_weight": 0.1,
        "model.path": str(model),
        "run.dir": str(folder),
        "optim.lr": 3e-3,
        "optim.warmup_ratio": 0.0,
        "trainer.global_batch_size": 8,
        "trainer.max_steps": 3,
        **{key.replace("__", "."): value for key, value in more.items()},
    }


def run(
    group: RankGroup, settings: dict[str, Any], *, valid: list[int] = VALID, **arguments: Any
) -> list[Any]:
    return group.run(JOB, timeout=LIMIT, settings=settings, valid=valid, **arguments)


def stopped(group: RankGroup, settings: dict[str, Any], *poison: dict[str, Any]) -> str:
    """The sentence of the run; the same on every rank, and the optimizer step was not taken on any."""
    facts = run(group, settings, poison=list(poison))
    sentences = {rank["error"] for rank in facts}
    assert len(sentences) == 1, sentences
    for rank in facts:
        assert rank["digests"][-1] == rank["digests"][-2]
    (sentence,) = sentences
    assert sentence is not None, "the run did not stop"
    return sentence


STOPS = [
    # TP2 x PP2: ranks 0, 1 are the first stage, 2 and 3 the last; 8 micro batches
    (
        {"what": "layer", "micro_batch": 2, "pp_rank": 0},
        "hidden states are not finite, first seen in micro batch 3 of 8 on global rank 0 "
        "(data-parallel rank 0, pipeline rank 0, tensor-parallel rank 0; rows {row} of the data files)",
    ),
    (
        {"what": "layer", "micro_batch": 7, "pp_rank": 1, "value": "inf"},
        "hidden states are not finite, first seen in micro batch 8 of 8 on global rank 2 "
        "(data-parallel rank 0, pipeline rank 1, tensor-parallel rank 0; rows {row} of the data files)",
    ),
    (
        {"what": "loss", "micro_batch": 4, "value": "inf"},
        "the loss is not finite (the hidden states are), first seen in micro batch 5 of 8 on global rank 2",
    ),
    (
        {"what": "reference", "micro_batch": 1},
        "the reference's hidden states are not finite (the policy's are), first seen in micro batch 2 of 8 on global rank 2",
    ),
    (
        {"what": "gradient", "pp_rank": 0, "tp_rank": 1},
        "a gradient is not finite (loss and hidden states are) on global rank 1 (data-parallel rank 0); the optimizer",
    ),
]


@pytest.mark.parametrize(
    ("poison", "said"), STOPS, ids=[row["what"] + str(row.get("pp_rank", "")) for row, _ in STOPS]
)
def test_stop_names_step_micro_batch_and_rank(
    ranks4: RankGroup, model: Path, tmp_path: Path, poison: dict[str, Any], said: str
) -> None:
    settings = settings_of(model, tmp_path / "run", tp=2, pp=2, world=4)
    sentence = stopped(ranks4, settings, {**poison, "step": 2})
    assert sentence.startswith("step 2: " + said.split("{row}")[0]), sentence
    found, told, _ = sentence.removeprefix("step 2: ").partition("; the optimizer step was not taken: ")
    assert told
    (alarm,) = alarms_of(tmp_path / "run")
    assert (alarm["kind"], alarm["step"], alarm["text"]) == ("nonfinite", 2, found)
    assert len(metrics(tmp_path / "run")) == 1


def test_stop_names_the_context_parallel_rank(ranks2: RankGroup, model: Path, tmp_path: Path) -> None:
    """Of two ranks that share every sequence, the one whose own gradient went wrong."""
    settings = settings_of(model, tmp_path / "run", world=2, parallel__cp_size=2)
    sentence = stopped(ranks2, settings, {"what": "gradient", "cp_rank": 1, "step": 2})
    assert sentence.startswith(
        "step 2: a gradient is not finite (loss and hidden states are) on global rank 1 ("
    )


def test_stop_names_the_rows_of_the_micro_batch(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """The rows the sampler put into the last micro batch of step 1."""
    settings = settings_of(model, tmp_path / "run", tp=2, pp=2, world=4, trainer__micro_batch_size=2)
    sentence = stopped(ranks4, settings, {"what": "layer", "step": 1, "micro_batch": 3, "pp_rank": 0})
    rows = re.search(r"; rows (\d+), (\d+) of the data files\)", sentence)
    assert rows is not None, sentence
    assert "micro batch 4 of 4" in sentence
    from asft_nemo.data import GlobalBatchSampler, Shuffled

    sampler = GlobalBatchSampler(
        Shuffled(64, seed=42),
        consumed_samples=0,
        micro_batch_size=2,
        global_batch_size=8,
        dp_rank=0,
        dp_size=1,
    )
    assert [int(row) for row in rows.groups()] == list(next(islice(iter(sampler), 3, None)))


@pytest.mark.parametrize(
    ("poison", "overlap", "said"),
    [
        (
            {"what": "layer", "micro_batch": 1, "dp_rank": 1},
            False,
            "hidden states are not finite, first seen in micro batch 2 of 4 on global rank 1 (data-parallel rank 1, ",
        ),
        # after the reduction both ranks hold it
        *(
            (
                {"what": "gradient", "dp_rank": 1, "value": "inf"},
                overlap,
                "a gradient is not finite (loss and hidden states are) on global rank 1 (data-parallel rank 1); ",
            )
            for overlap in (False, True)
        ),
    ],
    ids=["layer", "gradient", "gradient overlapped"],
)
def test_stop_names_the_data_parallel_rank(
    ranks2: RankGroup, model: Path, tmp_path: Path, poison: dict[str, Any], overlap: bool, said: str
) -> None:
    settings = settings_of(model, tmp_path / "run", world=2, optim__overlap_grad_reduce=overlap)
    assert stopped(ranks2, settings, {**poison, "step": 2}).startswith(f"step 2: {said}")


def test_stop_with_virtual_stages_and_sequence_parallelism(
    ranks4: RankGroup, model: Path, tmp_path: Path
) -> None:
    """Learned tokens in one tensor-parallel rank's rows alone; and the second virtual stage of the first pipeline rank."""
    both = {"parallel__vpp_size": 2, "parallel__sequence_parallel": True}
    settings = settings_of(model, tmp_path / "rows", tp=2, pp=2, world=4, **both)
    poison = {"what": "learned", "step": 1, "micro_batch": 5, "pp_rank": 1, "tp_rank": 1}
    facts = run(ranks4, settings, valid=[32], poison=[poison])
    assert (
        "hidden states are not finite, first seen in micro batch 6 of 8 on global rank 3 ("
        in facts[0]["error"]
    )
    settings = settings_of(model, tmp_path / "stage", tp=2, pp=2, world=4, **both)
    sentence = stopped(
        ranks4, settings, {"what": "layer", "step": 1, "micro_batch": 6, "pp_rank": 0, "chunk": 1}
    )
    assert (
        "first seen in micro batch 7 of 8 on global rank 0 (data-parallel rank 0, pipeline rank 0" in sentence
    )


def test_tokens_without_a_loss_may_be_anything(ranks2: RankGroup, model: Path, tmp_path: Path) -> None:
    """NaN in the final hidden states of every token that is not learned: the run is bit for bit the one without."""
    found = {}
    for name, steps in (("clean", ()), ("poisoned", (1, 2))):
        settings = settings_of(model, tmp_path / name, tp=2, world=2)
        found[name] = run(ranks2, settings, poison=[{"what": "unlearned", "step": step} for step in steps])
    assert [rank["error"] for rank in found["poisoned"]] == [None, None]
    assert [rank["digests"] for rank in found["poisoned"]] == [rank["digests"] for rank in found["clean"]]
    assert without_times(metrics(tmp_path / "poisoned")) == without_times(metrics(tmp_path / "clean"))


def test_tokens_without_a_loss_are_named_where_they_reach_a_gradient(
    ranks2: RankGroup, model: Path, tmp_path: Path
) -> None:
    """Megatron's own output layer multiplies every token's hidden state into the head's gradient: 0 * NaN."""
    settings = settings_of(model, tmp_path / "run", tp=2, world=2, loss__implementation="vocab_parallel")
    assert stopped(ranks2, settings, {"what": "unlearned", "step": 2, "micro_batch": 3}).startswith(
        "step 2: a gradient is not finite (loss and hidden states are) on global rank 0, 1 (data-parallel rank 0); "
        "hidden states of tokens without a loss were not finite in micro batch 4 on global rank 0; the optimizer"
    )


@pytest.mark.long
def test_the_guard_changes_nothing(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """With the guard (both settings) and without: the same metrics, weights and optimizer state, bit for bit."""
    found = {}
    for name, guarded, on_nonfinite in (
        ("stop", True, "stop"),
        ("skip", True, "skip"),
        ("none", False, "stop"),
    ):
        settings = settings_of(
            model, tmp_path / name, tp=2, pp=2, world=4, parallel__vpp_size=2, trainer__on_nonfinite=on_nonfinite,
            trainer__validate_every=2,
        )  # fmt: skip
        facts = run(ranks4, settings, poison=[], guarded=guarded, validation=8)
        checkpoint = all_tensors(tmp_path / name / "checkpoints" / "latest")
        found[name] = (
            [rank["digests"] for rank in facts],
            without_times(metrics(tmp_path / name)),
            checkpoint,
        )
    for name in ("stop", "skip"):
        assert found[name][:2] == found["none"][:2]
        assert [
            key for key in found["none"][2] if not torch.equal(found[name][2][key], found["none"][2][key])
        ] == []


def strict(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; NaN and Infinity, which JSON does not have, fail."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize("precision", some_of(["fp32", "bf16"], kept=["fp32"]))
def test_skip_leaves_weights_and_optimizer_alone(
    ranks4: RankGroup, model: Path, tmp_path: Path, precision: str
) -> None:
    """Steps 1, 3 and 4 of 6 go wrong, each in its own way, at TP2 x PP2: the others train on, on their own data and learning rate."""
    more = {
        "precision": precision,
        "trainer__max_steps": 6,
        "trainer__on_nonfinite": "skip",
        "trainer__max_skips": 3,
    }
    clean = settings_of(model, tmp_path / "clean", tp=2, pp=2, world=4, **more)
    run(ranks4, clean, poison=[])
    settings = settings_of(model, tmp_path / "run", tp=2, pp=2, world=4, **more)
    poison = [
        {"what": "loss", "step": 1, "micro_batch": 0},
        {"what": "layer", "step": 3, "micro_batch": 6, "pp_rank": 0},
        {"what": "gradient", "step": 4, "pp_rank": 1, "tp_rank": 0},
    ]
    for rank in run(ranks4, settings, poison=poison):
        assert rank["error"] is None
        kept = [before == after for before, after in pairwise(rank["digests"])]
        assert kept == [True, False, True, True, False, False]
        assert [largest == 0.0 for largest in rank["gradients"]] == kept
        assert all(largest >= 0.0 for largest in rank["gradients"])
    lines, expected = strict(tmp_path / "run"), strict(tmp_path / "clean")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["skipped"] for line in lines] == [True, False, True, True, False, False]
    for key in ("lr", "tokens"):
        assert [line[key] for line in lines] == [line[key] for line in expected]
    assert [line["loss"] is None for line in lines] == [True, False, True, False, False, False]
    assert [line["grad_norm"] is None for line in lines] == [True, False, True, True, False, False]
    assert lines[1]["kl"] == 0.0  # no update before step 2
    assert lines[3]["loss"] == pytest.approx(lines[3]["weighted_nll"] + 0.1 * lines[3]["kl"], rel=1e-5)
    assert lines[5]["kl"] > 0.0


def test_skips_are_limited_and_counted_over_a_resume(ranks4: RankGroup, model: Path, tmp_path: Path) -> None:
    """Two skips, a kill, a resume: the third stops the run at max_skips=2, and with max_skips=3 it goes on to the end."""
    settings = settings_of(
        model, tmp_path / "run", tp=2, pp=2, world=4, trainer__max_steps=6, trainer__checkpoint_every=1,
        trainer__on_nonfinite="skip", trainer__max_skips=2,
    )  # fmt: skip
    bad = [{"what": "layer", "step": step, "micro_batch": 0, "pp_rank": 0} for step in (1, 3, 5)]
    run(ranks4, settings, poison=bad, die_after=4)
    settings["trainer.resume"] = "must"
    sentence = stopped(ranks4, settings, *bad)
    assert sentence.startswith(
        "step 5: hidden states are not finite, first seen in micro batch 1 of 8 on global rank 0"
    )
    assert sentence.endswith(
        "and 2 of this run were skipped before: lower optim.lr or check the data, or resume with trainer.max_skips above 2"
    )
    assert [line["skipped"] for line in strict(tmp_path / "run")] == [True, False, True, False]
    settings["trainer.max_skips"] = 3
    facts = run(ranks4, settings, poison=bad)
    assert [rank["error"] for rank in facts] == [None] * 4
    assert [line["skipped"] for line in strict(tmp_path / "run")] == [True, False, True, False, True, False]


def test_sentences_of_several_ranks(ranks2: RankGroup) -> None:
    """The first micro batch, then the earliest stage, then the lowest rank; a data-parallel rank speaks for its own micro batches."""

    def said(*reports: dict[str, Any]) -> str:
        sentences = ranks2.run("nonfinite_jobs:explained", reports=list(reports), num_micro_batches=4)
        return sentences[0]

    hidden = said(
        {"rank": 0, "dp_rank": 0, "pp_rank": 0, "seen": [["ANY_HIDDEN", 1, 0]]},  # harmless: rank 2 saw nothing of it
        {"rank": 1, "dp_rank": 1, "pp_rank": 0, "seen": [["ANY_HIDDEN", 2, 1]]},
        {"rank": 2, "dp_rank": 0, "pp_rank": 1, "seen": [["HIDDEN", 3, 1], ["ANY_HIDDEN", 3, 1]]},
        {"rank": 3, "dp_rank": 1, "pp_rank": 1, "seen": [["HIDDEN", 2, 1], ["ANY_HIDDEN", 2, 1], ["ANY_HIDDEN", 2, 0]],
         "rows": {"2": list(range(10))}},
    )  # fmt: skip
    assert hidden == (
        "hidden states are not finite, first seen in micro batch 3 of 4 on global rank 3 (data-parallel rank 1, pipeline rank 1, "
        "tensor-parallel rank 0; rows 0, 1, 2, 3, 4, 5, 6, 7 and 2 more of the data files)"
    )
    sums = said(
        {"rank": 0, "dp_rank": 0, "seen": [["GRADIENT", 0, 0]]},
        {"rank": 1, "dp_rank": 1, "seen": [["GRADIENT", 0, 0]]},
    )
    assert sums == (
        "a gradient is not finite (loss and hidden states are), after the reduction only, on global rank 0, 1 "
        "(data-parallel rank 0, 1)"
    )
    padding = said(
        {"rank": 0, "seen": [["OWN_GRADIENT", 0, 0], ["ANY_HIDDEN", 1, 0]]},
        {"rank": 1, "pp_rank": 1, "seen": [["ANY_HIDDEN", 1, 0], ["GRADIENT", 0, 0]]},
    )
    assert padding == (
        "a gradient is not finite (loss and hidden states are) on global rank 0 (data-parallel rank 0); hidden states of tokens without "
        "a loss were not finite in micro batch 2 on global rank 0"
    )
