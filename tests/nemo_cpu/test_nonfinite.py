"""NaN and infinities on real ranks: what the sentence names, what a skipped step leaves alone, and that nobody hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import make_model
from ranks import RankGroup
from test_training import metrics

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

VALID = [5, 9, 32, 1, 17, 3, 2, 20]
JOB = "nonfinite_jobs:poisoned"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "untied", tied=False)


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


def stopped(group: RankGroup, settings: dict[str, Any], *poison: dict[str, Any]) -> str:
    """The sentence of the run; the same on every rank, and the optimizer step was not taken on any."""
    facts = group.run(JOB, settings=settings, valid=VALID, poison=list(poison))
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
    assert "; the optimizer step was not taken: " in sentence
    assert len(metrics(tmp_path / "run")) == 1
