"""RunConfig is immutable, hashable, and survives JSON."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest

from asft_nemo.config.schema import (
    REQUIRED,
    RunConfig,
    data_parallel_size,
    from_dict,
    num_microbatches,
    replace,
    to_dict,
    walk,
)
from asft_nemo.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "recipe": "test",
    "objective": {"name": "asft"},
    "reference": {"form": "resident"},
    "peft": {"name": "none"},
    "model": {"path": "somewhere"},
    "cluster": {"name": "local"},
}


def minimal(**changes: Any) -> RunConfig:
    return from_dict({**MINIMAL, **changes})


# The keys other parts and users rely on; renaming one is a breaking change.
CONTRACT = """
recipe experiment precision
objective.name objective.kl_weight objective.kl_direction
reference.form reference.precision reference.cache_dir reference.fill reference.micro_batch_size
reference.max_initial_kl
peft.name peft.rank peft.alpha peft.dropout peft.targets peft.adapter
loss.implementation loss.chunk_tokens loss.normalize_by
model.path
data.train data.weights data.weights_by data.when_exhausted data.validation data.template data.templates
data.validation_templates data.group_by_length data.fields.prompt data.fields.response data.sequence_length
data.packing data.loss_on data.on_bad_row data.on_too_long
parallel.tp_size parallel.pp_size parallel.vpp_size parallel.cp_size parallel.sequence_parallel
optim.lr optim.schedule optim.warmup_ratio
trainer.max_steps trainer.epochs trainer.global_batch_size trainer.micro_batch_size trainer.validate_every
trainer.checkpoint_every trainer.keep trainer.resume trainer.on_nonfinite
run.dir run.seed run.world_size
"""


def test_contract_keys_are_there() -> None:
    assert {key for key, _ in walk(RunConfig())} >= set(CONTRACT.split())


def test_round_trip_through_json() -> None:
    run = minimal(data={"train": ["a", "b"], "weights": [1, 2]}, loss={"chunk_tokens": 64})
    again = from_dict(json.loads(json.dumps(to_dict(run))))
    assert again == run
    assert hash(again) == hash(run)
    assert run.data.train == ("a", "b")
    assert run.data.weights == (1.0, 2.0)
    assert run.loss.chunk_tokens == 64


def test_survives_pickle_and_deepcopy_frozen() -> None:
    run = minimal()
    for twin in (pickle.loads(pickle.dumps(run)), copy.deepcopy(run)):
        assert twin == run
        with pytest.raises(dataclasses.FrozenInstanceError):
            twin.run.seed = 1


def test_nothing_can_be_assigned_or_deleted() -> None:
    run = minimal()
    for section, name in ((run, "precision"), (run.optim, "lr"), (run.data.fields, "prompt")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, name, "x")
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(section, name)
    with pytest.raises(AttributeError, match="no setting 'learning_rate'"):
        RunConfig().optim.learning_rate = 1  # type: ignore[attr-defined]


def test_replace_leaves_the_original_alone() -> None:
    run = minimal()
    other = replace(run, {"optim.lr": 1e-3, "data.fields.prompt": "q", "precision": "fp32"})
    assert (other.optim.lr, other.data.fields.prompt, other.precision) == (1e-3, "q", "fp32")
    assert run == minimal()
    with pytest.raises(ConfigError, match=r"optim\.lrr is not a setting"):
        replace(run, {"optim.lrr": 1})


def test_derived_values() -> None:
    run = minimal(parallel={"tp_size": 2, "pp_size": 3})
    assert run.run.world_size == 6
    assert run.run.dir == "runs/test-asft"
    assert minimal(experiment="e").run.dir == "runs/e-asft"
    explicit = minimal(
        run={"world_size": 4, "dir": "d"}, parallel={"tp_size": 2}, trainer={"global_batch_size": 12}
    )
    assert (explicit.run.world_size, explicit.run.dir) == (4, "d")
    assert data_parallel_size(explicit) == 2
    assert num_microbatches(explicit) == 6


def test_missing_settings_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict({"objective": {"name": "sft"}})
    named = {sentence.split(" ")[0] for sentence in caught.value.violations}
    assert named == {"recipe", "reference.form", "peft.name", "model.path", "run.dir", "cluster.name"}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"optim": {"lr": "fast"}}, "optim.lr='fast' is not a number"),
        ({"optim": {"lr": True}}, "optim.lr=True is not a number"),
        ({"run": {"seed": 1.5}}, "run.seed=1.5 is not a whole number"),
        ({"data": {"train": "a.jsonl"}}, "data.train='a.jsonl' is not a list [...] of texts"),
        ({"data": {"weights": ["x"]}}, "data.weights=['x'] is not a list [...] of numbers"),
        ({"data": 3}, "data=3 is a section: set data.<name>=... instead"),
        ({"parallel": {"vpp_size": "x"}}, "parallel.vpp_size='x' is not a whole number or null"),
        ({"data": {"packing": "yes"}}, "data.packing='yes' is not true or false"),
    ],
)
def test_wrong_types_are_named(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict({**MINIMAL, **values})
    assert caught.value.violations == (sentence,)


def test_what_has_no_default_is_marked() -> None:
    required = {key for key, value in walk(RunConfig()) if value == REQUIRED}
    assert required == {
        "recipe", "objective.name", "reference.form", "peft.name", "model.path", "run.dir", "run.world_size", "cluster.name",
    }  # fmt: skip


def test_schema_imports_nothing_heavy() -> None:
    code = "import sys, asft_nemo.config.schema; print([m for m in ('torch', 'hydra', 'nemo', 'numpy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
