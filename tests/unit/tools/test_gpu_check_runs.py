"""The GPU check's parts that train, at small sizes on CPU ranks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import RankGroup

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

import gpu_check
from bench import gpu_cluster, gpu_form_tables, gpu_forms, gpu_steps
from bench.gpu_parts import Check

pytestmark = [pytest.mark.nemo, pytest.mark.multiproc, pytest.mark.slow]


class Forked:
    """Ranks of the tests' nursery, which has imported NeMo already, in place of the check's own processes."""

    def __init__(self, group: RankGroup):
        self.world_size, self._group = group.world_size, group

    def run(self, call: str, *, timeout: float, **arguments: Any) -> list[Any]:
        if call.startswith("bench."):
            return self._group.run("gpu_check_jobs:call", timeout=timeout, job=call, arguments=arguments)
        return self._group.run(call, timeout=timeout, **arguments)


class ForkedCheck(Check):
    """A rehearsal on forked ranks; `one` and `two` are theirs."""

    groups: dict[int, RankGroup]

    def ranks(self, size: int | None = None, **environment: Any) -> Any:
        return contextlib.nullcontext(Forked(self.groups[size or self.nproc]))


@pytest.fixture(scope="module")
def ranks1() -> Iterator[RankGroup]:
    group = RankGroup(1)
    yield group
    group.close()


def forked_check(folder: Path, *groups: RankGroup, nproc: int = 1) -> ForkedCheck:
    options = gpu_check._parser().parse_args(["--out", str(folder), "--prompt-share", "0.3"])
    options.precision = "fp32"
    check = ForkedCheck(options, "cpu", folder, nproc=nproc)
    check.groups = {group.world_size: group for group in groups}
    return check


def test_steps_with_lora_at_small_sizes(ranks1: RankGroup, tmp_path: Path) -> None:
    """The part as a GPU runs it: model, examples, three runs, ratios; only the times mean nothing here."""
    found = gpu_steps.check_steps(gpu_steps.LORA, forked_check(tmp_path, ranks1))
    assert [run["form"] for run in found["runs"]] == ["lora_sft", "lora_adapter_disabled", "lora_sft"]
    assert [len(run["seconds"]) for run in found["runs"]] == [2, 2, 2]
    assert found["runs"][0]["losses"] == found["runs"][2]["losses"]
    assert found["runs"][1]["first_kl"] == 0.0
    (row,) = found["rows"]
    assert 1.3 < row["law"] < 1.5
    assert 0.6 < row["learned_share"] < 0.85, "--prompt-share 0.3"
    assert row["ratio"] > 0
    assert found["bars"]["ratio_lora_adapter_disabled"]["limit"] == row["law"] + 0.03
    assert not (tmp_path / "steps_lora_sft").exists(), "nothing of the real sizes' tens of GB stays"


@pytest.mark.long
def test_steps_with_every_reference_at_small_sizes(ranks1: RankGroup, tmp_path: Path) -> None:
    found = gpu_steps.check_steps(gpu_steps.FULL, forked_check(tmp_path, ranks1))
    assert [row["form"] for row in found["rows"]] == ["cached", "offloaded", "resident"]
    laws = {row["form"]: row["law"] for row in found["rows"]}
    assert 1.0 < laws["cached"] < laws["resident"] == laws["offloaded"] == pytest.approx(4 / 3, abs=0.01)


@pytest.mark.long
def test_forms_at_small_sizes(ranks1: RankGroup, tmp_path: Path) -> None:
    """What a GPU trains in earnest: the cache and the run that reads it, and a profiled run, whose page is kept."""
    check = forked_check(tmp_path, ranks1)
    small = {"hidden": 64, "layers": 2, "sequence_length": 64, "micro_batch_size": 1, "micro_batches": 2}
    for name, value in {**small, "out": tmp_path / "out", "forms": ["cached", "resident_profiled"]}.items():
        setattr(check.options, name, value)
    found = gpu_forms.check_forms(check)
    assert list(found["runs"]) == ["sft", "cached", "resident_profiled"]
    assert found["bars"]["failed"]["measured"] == 0, found
    assert found["runs"]["cached"]["kl_at_step_0"] == 0.0
    assert found["runs"]["cached"]["summary"]["reference_disk_bytes"] > 0
    assert len(found["runs"]["sft"]["losses"]) == check.options.steps
    assert not (tmp_path / "forms" / "cached" / "checkpoints").exists()
    assert "| asft, cached |" in gpu_form_tables.forms_table(found)
    kept = gpu_forms.check_kept(check)
    assert (tmp_path / "out" / "gpu_check_profile" / "summary.md").is_file(), kept


def test_gradients_of_two_ranks(ranks2: RankGroup, tmp_path: Path) -> None:
    """The part of --nproc 2 at one of its layouts, the jobs and the oracle included; a layout that breaks does not stop the others."""
    layouts = {"tp2_sp": gpu_cluster.LAYOUTS["tp2_sp"], "odd": (2, {"parallel.tp_size": 3}), "four": (4, {})}
    found = gpu_cluster.check_gradients(layouts, forked_check(tmp_path, ranks2, nproc=2))
    assert set(found["rows"]) == {"tp2_sp", "odd"}
    assert 0 < found["bars"]["error"]["measured"] <= 1e-5
    assert found["bars"]["failed"] == {"measured": 1, "limit": 0}
    assert "must be a multiple of tensor_model_parallel_size (3)" in found["rows"]["odd"]["failed"]


@pytest.mark.long
def test_the_other_parts_of_two_ranks(ranks2: RankGroup, tmp_path: Path) -> None:
    check = forked_check(tmp_path, ranks2, nproc=2)
    for work in (gpu_cluster.check_checkpoint, gpu_cluster.check_overlap):
        found = work(check)
        assert found["bars"]["failed"]["measured"] == 0, found
        key = next(key for key in found["bars"] if key != "failed")
        assert found["bars"][key]["measured"] <= found["bars"][key]["limit"]
    tp2 = {"tp2": gpu_cluster.LAYOUTS["tp2"]}
    assert gpu_cluster.check_bf16(tp2, check)["bars"]["of_plain"]["measured"] < 1.5
    assert (
        gpu_cluster.check_gradients(gpu_cluster.CONTEXT_LAYOUTS, check)["bars"]["error"]["measured"] <= 1e-5
    )
