"""The first hour on a new cluster, in ten minutes: what several GPUs of one node must do before anybody trains on them.

Gradients are those of real steps, by the jobs and the fp64 oracle of the tests (`tests/nemo_cpu`), on a random model of four layers.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.compared import figures, largest, worst
from bench.gpu_form_tables import LOSS_OF_FP8, STEPS_OF_FP8
from bench.gpu_forms import lacks
from bench.gpu_parts import NO_TF32, TESTS, TIME_IS_UP, TRANSFORMER_ENGINE, Check, a_gpu, cell
from bench.gpu_rank import sentence
from bench.gpu_ranks import RankFailed

log = logging.getLogger("gpu_check")

START_SECONDS = 150  # a rank imports NeMo; the first kernels of a GPU are compiled
JOB_SECONDS = 90
EXACT, TO_ROUNDING, OF_PLAIN, OF_BF16 = 1e-5, 1e-6, 1.5, 2**-8
LOCAL = {"kernels.layers": "local"}  # Transformer Engine multiplies fp32 as TF32

_TP2, _PP2 = {"parallel.tp_size": 2}, {"parallel.pp_size": 2}
_VPP2, _SP = {**_PP2, "parallel.vpp_size": 2}, {"parallel.sequence_parallel": True}
_CP2 = {"parallel.cp_size": 2}
#: name -> (ranks of one copy of the model, settings); what is left of --nproc is data parallelism
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, _TP2),
    "pp2": (2, _PP2),
    "tp2_sp": (2, {**_TP2, **_SP}),
    "dp": (1, {}),
    "pp2_vpp2": (2, _VPP2),
    "tp2_pp2_vpp2_sp": (4, {**_TP2, **_VPP2, **_SP}),
}
CONTEXT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "cp2": (2, _CP2),
    "tp2_cp2_sp": (4, {**_TP2, **_CP2, **_SP}),
}


class Timed:
    """Ranks whose jobs have a time-out of this check's: the first one starts them."""

    def __init__(self, ranks: Any):
        self.world_size, self._ranks, self._started = ranks.world_size, ranks, False

    def run(self, call: str, **arguments: Any) -> list[Any]:
        """See `Ranks.run`."""
        seconds = JOB_SECONDS if self._started else START_SECONDS
        self._started = False  # after a failure they are started again
        found = self._ranks.run(call, timeout=seconds, **arguments)
        self._started = True
        return found


def tests_at_hand() -> Any:
    """The tests' modules: real steps and their oracle."""
    for folder in map(str, TESTS):
        if folder not in sys.path:
            sys.path.insert(1, folder)  # before packages of the same names that an environment may hold
    import gradients  # pyright: ignore[reportMissingImports]

    return gradients


def fitting(layouts: Mapping[str, tuple[int, dict[str, Any]]], nproc: int) -> dict[str, dict[str, Any]]:
    """Layouts whose copies of the model use all ranks."""
    return {name: settings for name, (ranks, settings) in layouts.items() if nproc % ranks == 0}


def attempts(works: Mapping[str, Callable[[], dict[str, Any]]], check: Check) -> dict[str, dict[str, Any]]:
    """What each one found, or why it failed, or was skipped for want of time; the others go on."""
    found: dict[str, dict[str, Any]] = {}
    for name, work in works.items():
        log.info("  %s", name)
        if check.late():
            found[name] = {"skipped": TIME_IS_UP}
            continue
        try:
            found[name] = work()
        except Exception as error:
            why = str(error) if isinstance(error, RankFailed) else sentence(error)
            log.error("%s failed: %s\n%s", name, why, getattr(error, "log", ""))
            late = isinstance(error, RankFailed) and check.late()
            found[name] = {"skipped": TIME_IS_UP} if late else {"failed": why}
    return found


def bars_of(rows: Mapping[str, Mapping[str, Any]], key: str, limit: float) -> dict[str, dict[str, Any]]:
    """The worst of a number over all rows that have it, and how many failed."""
    numbers = [row[key] for row in rows.values() if key in row]
    failed = [row["failed"] for row in rows.values() if "failed" in row]
    bars: dict[str, dict[str, Any]] = {"failed": {"measured": len(failed), "limit": 0}}
    if numbers:
        bars[key] = {"measured": worst(numbers), "limit": limit}
    elif failed:
        bars[key] = {"reason": failed[0]}
    return bars


def rows_table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as Markdown: a name, numbers, or why it failed or was left out."""
    lines = ["| | " + " | ".join(columns.values()) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        if "failed" in row or "skipped" in row:
            why = f"failed: {row['failed']}" if "failed" in row else f"skipped: {row['skipped']}"
            lines.append(f"| {name} | {cell(why)} |" + " |" * (len(columns) - 1))
        else:
            lines.append(f"| {name} | " + " | ".join(_number(row.get(key)) for key in columns) + " |")
    return "\n".join(lines)


def _number(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else "" if value is None else cell(value)


def check_collectives(check: Check) -> dict[str, Any]:
    """Results and bandwidths, the slowest rank's."""
    sizes, repeats = ([1], 2) if check.small else ([1, 16, 256], 20)
    with check.ranks() as ranks:
        told = ranks.run(
            "bench.gpu_collectives:collectives",
            timeout=START_SECONDS,
            sizes=sizes,
            repeats=repeats,
            device=check.device,
        )
    rows = {}
    for same in zip(*told, strict=True):
        name = f"{same[0]['operation']}, {same[0]['mib']} MiB"
        wrong = [str(rank) for rank, row in enumerate(same) if not row["right"]]
        rows[name] = {
            "gb_per_second": min(row["gb_per_second"] for row in same),
            "right": "right" if not wrong else f"wrong on rank {', '.join(wrong)}",
        }
    number = sum(row["right"] != "right" for row in rows.values())
    return {"rows": rows, "bars": {"wrong": {"measured": number, "limit": 0}}}


def _model(check: Check, name: str, **sizes: Any) -> Path:
    from models import make_model  # pyright: ignore[reportMissingImports]

    return make_model(check.place(name) / "model", tied=False, **sizes)


def check_gradients(layouts: Mapping[str, tuple[int, dict[str, Any]]], check: Check) -> dict[str, Any]:
    """A real asft step in fp32 at every layout, every parameter's gradient against fp64 on one process; relative to the largest entry."""
    tests = tests_at_hand()
    model = _model(check, "exact")

    def one(name: str, layout: dict[str, Any]) -> dict[str, Any]:
        settings = {**tests.OBJECTIVES["asft"], **LOCAL, **layout}
        step = tests.megatron_step(group, settings, model, check.place(f"exact_{name}"))
        expected, loss = tests.fp64_gradients(step, settings, model)
        error, where = tests.worst_error(step.gradients, expected)
        return {"error": error, "where": where, "loss_error": abs(step.loss / loss - 1)}

    with check.ranks(environment=NO_TF32) as ranks:
        group = Timed(ranks)
        wanted = fitting(layouts, check.nproc)
        rows = attempts({name: lambda name=name: one(name, wanted[name]) for name in wanted}, check)
    return {"rows": rows, "bars": bars_of(rows, "error", EXACT)}


def check_bf16(layouts: Mapping[str, tuple[int, dict[str, Any]]], check: Check) -> dict[str, Any]:
    """The same in bf16 with the layers that training takes, beside transformers' model in bf16 on a CPU; errors in norm, all tensors together."""
    tests = tests_at_hand()
    import plain_bf16 as plain  # pyright: ignore[reportMissingImports]

    model = plain.rounded_model(check.place("bf16") / "model", seed=0)

    def one(name: str, layout: dict[str, Any]) -> dict[str, Any]:
        settings = {**tests.OBJECTIVES["asft"], "precision": "bf16", **layout}
        step = tests.megatron_step(group, settings, model, check.place(f"bf16_{name}"))
        exact, _ = tests.fp64_gradients(step, settings, model)
        data, chosen = tests.random_tokens(), tests.chosen_objective(settings)
        items = [data[index] for indices in tests.second_batch(data) for index in indices]
        other = plain.plain_gradients(step.policy, model, items, chosen, split=False)
        errors = [plain.relative(plain.squares(found, exact)) for found in (step.gradients, other)]
        return {"error": errors[0], "plain": errors[1], "of_plain": errors[0] / errors[1]}

    with check.ranks() as ranks:
        group = Timed(ranks)
        wanted = fitting(layouts, check.nproc)
        rows = attempts({name: lambda name=name: one(name, wanted[name]) for name in wanted}, check)
    return {"rows": rows, "bars": bars_of(rows, "of_plain", OF_PLAIN)}


def check_main_grad(check: Check) -> dict[str, Any]:
    """Gradients that the GEMM itself adds to `main_grad`, against those that are added afterwards; relative to the largest entry."""
    tests = tests_at_hand()
    model = _model(check, "main_grad")

    def one(layout: dict[str, Any]) -> dict[str, Any]:
        found = []
        for fused in (False, True):
            settings = {**tests.OBJECTIVES["asft"], **LOCAL, **layout}
            settings["kernels.gradient_accumulation_fusion"] = fused
            found.append(tests.megatron_step(group, settings, model, check.place("main_grad_run")).gradients)
        expected = {name: gradient.double() for name, gradient in found[0].items()}
        error, where = tests.worst_error(found[1], expected)
        return {"error": error, "where": where}

    with check.ranks(environment=NO_TF32) as ranks:
        group = Timed(ranks)
        wanted = fitting(LAYOUTS, check.nproc)
        rows = attempts({name: lambda name=name: one(wanted[name]) for name in ("tp2_sp", "dp")}, check)
    return {"rows": rows, "bars": bars_of(rows, "error", EXACT)}


def _losses(check: Check, group: Timed, model: Path, name: str, settings: dict[str, Any]) -> list[float]:
    """Trains on random tokens; the losses and gradient norms of all steps."""
    tests = tests_at_hand()
    run_dir = check.folder / name / "run"
    if settings.get("trainer.resume") != "must":
        check.place(name)
    asked = tests.step_settings(group, model, run_dir, {"trainer.max_steps": 4, **settings})
    group.run("jobs:train_steps", settings=asked, valid=tests.VALID)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    pairs = zip(figures(lines, "loss"), figures(lines, "grad_norm"), strict=True)
    return [number for pair in pairs for number in pair]


def check_overlap(check: Check) -> dict[str, Any]:
    """Losses and gradient norms of four steps with overlapped communication, against those without."""
    tests = tests_at_hand()
    model = _model(check, "overlap", hidden_size=256)
    asft, sharded = tests.OBJECTIVES["asft"], {"optim.distributed": True}
    reduce = {**sharded, "optim.overlap_grad_reduce": True}
    gather = {**reduce, "optim.overlap_param_gather": True}
    inside = {**_TP2, **_SP, "precision": "bf16"}

    def apart(name: str, before: dict[str, Any], more: dict[str, Any], limit: float) -> dict[str, Any]:
        found = [
            _losses(check, group, model, f"{name}_{number}", {**asft, **given})
            for number, given in enumerate((before, {**before, **more}))
        ]
        return {"of_bound": largest(found[1], found[0]) / limit, "difference": largest(found[1], found[0])}

    exact = {**LOCAL, **sharded}
    works: dict[str, Callable[[], dict[str, Any]]] = {
        "gradients reduced during backward": lambda: apart("reduce", exact, reduce, TO_ROUNDING),
        "and parameters gathered during forward": lambda: apart("gather", exact, gather, TO_ROUNDING),
    }
    tensor = "tensor parallelism inside the GEMMs"
    missing = a_gpu(check) or TRANSFORMER_ENGINE(check)
    if missing is None:
        works[tensor] = lambda: apart("tensor", inside, {"parallel.tp_comm_overlap": True}, OF_BF16)
    # The row of tensor parallelism needs the latter before anything of the device is used.
    with check.ranks(environment={**NO_TF32, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}) as ranks:
        group = Timed(ranks)
        rows = attempts(works, check)
    bars = bars_of(rows, "of_bound", 1.0)
    return {"rows": {**rows, **({} if missing is None else {tensor: {"skipped": missing}})}, "bars": bars}


def check_checkpoint(check: Check) -> dict[str, Any]:
    """Four steps at TP2; again from the second step's checkpoint at other layouts: the third and fourth step's losses and norms."""
    tests = tests_at_hand()
    model = _model(check, "checkpoint")
    saved = {**tests.OBJECTIVES["asft"], **LOCAL, "trainer.checkpoint_every": 2, "trainer.keep": "last:2"}

    def resumed(layout: dict[str, Any]) -> dict[str, Any]:
        latest = check.folder / "resumed" / "run" / "checkpoints" / "latest"
        latest.unlink()
        latest.symlink_to("step_2")
        found = _losses(check, group, model, "resumed", {**saved, **layout, "trainer.resume": "must"})
        return {"difference": largest(found, expected)}

    with check.ranks(environment=NO_TF32) as ranks:
        group = Timed(ranks)
        expected = _losses(check, group, model, "resumed", {**saved, **_TP2})
        wanted = {f"TP2 to {name}": fitting(LAYOUTS, check.nproc)[name] for name in ("tp2", "pp2", "dp")}
        rows = attempts(
            {name: lambda layout=layout: resumed(layout) for name, layout in wanted.items()}, check
        )
    return {"rows": rows, "bars": bars_of(rows, "difference", EXACT)}


def check_fp8(check: Check) -> dict[str, Any]:
    """The last loss of sft at TP2 in FP8, beside bf16's, after as many steps as its bound is meant for."""
    tests = tests_at_hand()
    model = _model(check, "fp8", hidden_size=256)
    sft = {**tests.OBJECTIVES["sft"], **_TP2, **_SP, "trainer.max_steps": STEPS_OF_FP8}

    def one(precision: str) -> dict[str, Any]:
        if (missing := lacks([f"precision={precision}"])) is not None:
            return {"skipped": f"no {missing}"}
        found = _losses(check, group, model, precision, {**sft, "precision": precision})
        return {"loss": found[-2], "difference": abs(found[-2] / bf16 - 1)}

    with check.ranks() as ranks:
        group = Timed(ranks)
        bf16 = _losses(check, group, model, "fp8_bf16", {**sft, "precision": "bf16"})[-2]
        rows = attempts({name: lambda name=name: one(name) for name in ("fp8_current", "fp8_delayed")}, check)
    return {"rows": rows, "bars": bars_of(rows, "difference", LOSS_OF_FP8)}
