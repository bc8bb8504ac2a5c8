"""Checkpoints cross from one kind of layers to the other: Transformer Engine's `_extra_state` entries may be too many or too few, nothing else.

Transformer Engine itself is not here: Megatron's local layers write and ask for what its modules would (see the job).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankGroup
from real_runs import VALID, all_tensors, metrics, settings_of, without_times

from asft_nemo.checkpoint import export_hf, verify
from asft_nemo.checkpoint.dist_metadata import read_metadata

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]

LAYERS = 4
# two virtual stages on each rank: a checkpoint's entries are nested by chunk
LAYOUT = {"parallel.tp_size": 1, "parallel.pp_size": 2, "parallel.vpp_size": 2, "run.world_size": 2}
OTHER = {"local": "transformer_engine", "transformer_engine": "local"}


def extra_states(checkpoint: Path) -> set[str]:
    return {
        key
        for key in read_metadata(checkpoint / "weights").state_dict_metadata
        if "_extra_state" in key and not key.startswith("optimizer.")
    }


@pytest.fixture(scope="module")
def runs(ranks2: RankGroup, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four steps with each kind of layers, with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("runs")
    for like in OTHER:
        settings = settings_for(model, folder / like)
        ranks2.run("extra_state_jobs:train", settings=settings, valid=VALID, like=like)
    return {like: folder / like for like in OTHER}


def settings_for(model: Path, folder: Path) -> dict[str, Any]:
    kept = {"trainer.checkpoint_every": 2, "trainer.keep": "last:2"}
    return {**settings_of(model, folder, trainer__max_steps=4), **LAYOUT, **kept}


def test_what_each_kind_writes(runs: dict[str, Path]) -> None:
    latest = {like: folder / "checkpoints" / "latest" for like, folder in runs.items()}
    written = {like: extra_states(checkpoint) for like, checkpoint in latest.items()}
    linear = [
        f"module.decoder.layers.{name}._extra_state/shard_{layer}_{LAYERS}"
        for name in (
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        )
        for layer in range(LAYERS)
    ]
    assert written["local"] == set(linear)
    assert written["transformer_engine"] == {
        *linear,
        "module.decoder.final_layernorm._extra_state/shard_0_1",
    }
    tensors = [all_tensors(checkpoint) for checkpoint in latest.values()]
    assert tensors[0].keys() == tensors[1].keys()


@pytest.mark.parametrize("like", list(OTHER))
def test_a_run_goes_on_with_the_other_kind(
    ranks2: RankGroup, model: Path, tmp_path: Path, like: str, runs: dict[str, Path]
) -> None:
    """`like` goes on where the other kind was after two steps; both halves together are either run without a stop, bit for bit."""
    straight, resumed = runs[OTHER[like]], tmp_path / "resumed"
    shutil.copytree(straight, resumed, symlinks=True)
    checkpoints = resumed / "checkpoints"
    shutil.rmtree(checkpoints / "step_4")
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("step_2")
    settings = {**settings_for(model, resumed), "trainer.resume": "must"}
    found = ranks2.run("extra_state_jobs:train", settings=settings, valid=VALID, like=like)
    if like == "transformer_engine":
        # no extra state is asked for but for delayed scaling, which no CPU rank has
        assert [rank["given"] for rank in found] == [0, 0]
        assert all(rank["none"] > 0 for rank in found)
    ends = [all_tensors(folder / "checkpoints" / "latest") for folder in (*runs.values(), resumed)]
    for other, folder in zip(ends, runs.values(), strict=False):
        assert without_times(metrics(resumed)) == without_times(metrics(folder))
        assert ends[-1].keys() == other.keys()
        assert [key for key in other if not torch.equal(other[key], ends[-1][key])] == []


@pytest.mark.parametrize("like", list(OTHER))
def test_it_is_exported_verified_and_a_base_for_the_other_kind(
    ranks2: RankGroup, tmp_path: Path, like: str, runs: dict[str, Path]
) -> None:
    checkpoint = runs[OTHER[like]] / "checkpoints" / "latest"
    export_hf(checkpoint, tmp_path / "hf")
    assert verify(checkpoint, tmp_path / "hf").identical
    settings = {**settings_of(checkpoint, tmp_path / "run", trainer__max_steps=1), **LAYOUT}
    ranks2.run("extra_state_jobs:train", settings=settings, valid=VALID, like=like)
    [line] = metrics(tmp_path / "run")
    assert line["kl"] == 0.0, "policy and reference both start from the checkpoint's weights"


def test_a_parameter_that_is_not_there_is_still_an_error(
    ranks2: RankGroup, tmp_path: Path, runs: dict[str, Path]
) -> None:
    checkpoint = runs["local"] / "checkpoints" / "latest"
    settings = {
        **settings_of(checkpoint, tmp_path / "run", objective__name="sft", reference__form="none"),
        **LAYOUT,
    }
    found = ranks2.run(
        "extra_state_jobs:train", settings=settings, valid=VALID, like="transformer_engine", gain=True
    )
    assert all("module.decoder.final_layernorm.gain" in rank["error"] for rank in found), found


LAYER, OTHER_OBJECT = "layer._extra_state", "optimizer.param_groups"


@pytest.mark.parametrize(
    ("name", "trusts", "guarded", "refused", "ran"),
    [
        (LAYER, False, True, False, False),  # never read
        (LAYER, True, True, True, False),
        (OTHER_OBJECT, False, True, True, False),
        (OTHER_OBJECT, False, False, False, True),  # Megatron's own loader: what all this is for
    ],
)
def test_objects_of_a_checkpoint_run_no_code(
    ranks2: RankGroup, tmp_path: Path, name: str, trusts: bool, guarded: bool, refused: bool, ran: bool
) -> None:
    found = ranks2.run(
        "extra_state_jobs:objects_of_a_stranger",
        folder=str(tmp_path),
        trusts=trusts,
        guarded=guarded,
        name=name,
    )
    for rank in found:
        assert rank["ran"] is ran
        assert bool(rank["error"]) is refused
        if refused:
            assert f"{name}/shard_0_1 of the checkpoint is more than plain values" in rank["error"]
        else:
            assert "tensor" in rank["loaded"]
            assert (name in rank["loaded"]) is ran
