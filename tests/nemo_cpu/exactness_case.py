"""A case of the exactness matrix: two steps on real ranks, and the second one's loss and gradients against fp64."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exactness_factors import SHAPE, Case, settings_of_case, world_size
from exactness_oracle import Examples, adapted_policy, expected, full_policy
from gradients import BATCH, BOUND, VALID, chosen_objective
from jobs import examples, run_config
from models import load64, make_model, read_hf, worst_error
from ranks import RankGroup
from real_runs import all_tensors
from torch import Tensor

from asft_nemo.checkpoint.convert import export_hf, import_hf
from asft_nemo.config.schema import num_microbatches
from asft_nemo.data import GlobalBatchSampler, PackedDataset
from asft_nemo.data.ordering import training_order
from asft_nemo.objectives import Objective

#: learned in a case that fills its cache itself: few enough to be all of step 1, so that step 2 reads what step 1 wrote
FILLING = {False: 8, True: 15}
MANY = 64


@dataclass(frozen=True)
class Measured:
    """What a case was off by.

    Attributes:
        error: of the gradients: the largest over all tensors of |found - expected| / |expected|, Euclidean norms.
        tensor: where.
        of_largest: the largest difference of any entry over the largest entry of all gradients, as in test_gradients.py.
        loss: relative.
        tensors: how many were compared.
        seconds: of the whole case.
    """

    error: float
    tensor: str
    of_largest: float
    loss: float
    tensors: int
    seconds: float

    @property
    def exact(self) -> bool:
        """Whether everything is within the bound."""
        return all(one <= BOUND for one in (self.error, self.of_largest, self.loss))


def make_models(folder: Path) -> dict[str, Path]:
    """A random model with untied and one with tied embeddings: `hf` and `nemo` of each."""
    made = {}
    for name in ("untied", "tied"):
        hf_dir = make_model(
            folder / name / "hf",
            tied=name == "tied",
            num_layers=SHAPE.num_layers,
            num_heads=SHAPE.num_attention_heads,
            num_groups=SHAPE.num_query_groups,
        )
        import_hf(hf_dir, folder / name / "nemo")
        made[name] = folder / name
    return made


def measure(
    case: Case, group: RankGroup, models: dict[str, Path], folder: Path, *, fault: str | None = None
) -> Measured:
    """Runs a case, with a key of `exactness_faults.FAULTS` wrongly; what it leaves in `folder` is removed."""
    began = time.perf_counter()
    base, run_dir, out = models[case["embeddings"]], folder / "run", folder / "gradients"
    settings = {**settings_of_case(case), "model.path": str(base / "nemo"), "run.dir": str(run_dir)}
    settings.setdefault("reference.fill", "job")
    packed = case["rows"] == "packed"
    size = FILLING[packed] if settings["reference.fill"] == "first_epoch" else MANY
    assert group.world_size == world_size(case)
    group.run("exactness_jobs:step", settings=settings, valid=VALID, size=size, out=str(out), fault=fault)
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    if settings["reference.form"] == "cached":
        assert last["cache_hit_rate"] == 1.0
    found = _found(case, out, folder)
    wanted, loss = _wanted(case, settings, base / "hf", folder, size=size)
    result = _measured(found, wanted)
    shutil.rmtree(folder)
    return dataclasses.replace(result, loss=abs(last["loss"] / loss - 1), seconds=time.perf_counter() - began)


def _found(case: Case, out: Path, folder: Path) -> dict[str, Tensor]:
    """The ranks' gradients: of adapters under their names in a checkpoint, of weights under Hugging Face names."""
    if case["adapters"] == "lora":
        return _adapters_in(out)
    export_hf(out, folder / "gradients_hf")
    return read_hf(folder / "gradients_hf")


def _wanted(
    case: Case, settings: dict[str, Any], base: Path, folder: Path, *, size: int
) -> tuple[dict[str, Tensor], float]:
    """The oracle's, at the weights that the first step left."""
    after_step_1 = folder / "run" / "checkpoints" / "step_1"
    if case["adapters"] == "lora":
        adapters = _adapters_in(after_step_1)
        assert all(bool(value.any()) for value in adapters.values())  # B, too, has left zero
        policy = adapted_policy(base, adapters)
    else:
        export_hf(after_step_1, folder / "policy")
        policy = full_policy(folder / "policy")
    return expected(
        *policy,
        load64(base),
        _step_2(case, settings, size=size),
        objective=_objective(settings),
        mean_of_micro_batches=case["mean"] == "of micro batches",
    )


def _adapters_in(checkpoint: Path) -> dict[str, Tensor]:
    return {key: value for key, value in all_tensors(checkpoint).items() if key.startswith("module.")}


def _objective(settings: dict[str, Any]) -> Objective:
    """The objective that the run has, the schema's own weight and direction where none are given."""
    given = run_config(settings).objective
    return chosen_objective(
        {**settings, "objective.kl_weight": given.kl_weight, "objective.kl_direction": given.kl_direction}
    )


def _step_2(case: Case, settings: dict[str, Any], *, size: int) -> list[Examples]:
    """The second step's micro batches of all data-parallel ranks, as examples of their own."""
    run, dp_size = run_config(settings), int(case["dp"])
    items = examples(run, size, VALID)
    of_item = items.rows.__getitem__ if isinstance(items, PackedDataset) else lambda item: [item]
    alone: Any = items.examples if isinstance(items, PackedDataset) else items
    batches = []
    for dp_rank in range(dp_size):
        sampler = GlobalBatchSampler(
            training_order(run, items),
            consumed_samples=BATCH,
            micro_batch_size=run.trainer.micro_batch_size,
            global_batch_size=BATCH,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )
        batches += itertools.islice(sampler, num_microbatches(run))
    return [[alone[example] for item in batch for example in of_item(item)] for batch in batches]


def _measured(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> Measured:
    """Of the gradients alone."""
    of_largest, _ = worst_error(found, wanted)  # which also looks that they are the same tensors, and finite
    errors = {
        name: float((found[name].double() - value).norm() / value.norm()) for name, value in wanted.items()
    }
    tensor = max(errors, key=errors.__getitem__)
    return Measured(errors[tensor], tensor, of_largest, loss=0.0, tensors=len(errors), seconds=0.0)
