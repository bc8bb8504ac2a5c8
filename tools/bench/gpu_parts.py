"""The parts of `tools/gpu_check.py`: what each needs, how long it may take, and the bars that judge what it finds."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_rank import sentence
from bench.gpu_ranks import RankFailed, Ranks

log = logging.getLogger("gpu_check")

ROOT = Path(__file__).resolve().parents[2]
TESTS = (ROOT / "tests", ROOT / "tests" / "nemo_cpu")
GIB = 2**30
UNMEASURED = "unmeasured"
TIME_IS_UP = "--minutes was up"
# cuBLAS would round fp32 operands to TF32 where a container asks for it, as NVIDIA's do
NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}


class SkipPart(Exception):
    """A part cannot run here; the message says why."""


@dataclass
class Check:
    """What the parts are given.

    Attributes:
        options: of the command line.
        device: "cuda", or "cpu" for a rehearsal at small sizes.
        folder: for what is not kept.
        nproc: ranks, 1 for the check of one GPU.
        minutes: for all parts together.
        began: when, by `time.monotonic`.
        scale: measured seconds of the parts so far over what was expected.
    """

    options: argparse.Namespace
    device: str
    folder: Path
    nproc: int = 1
    minutes: float = math.inf
    began: float = field(default_factory=time.monotonic)
    scale: float = 1.0

    @property
    def small(self) -> bool:
        """Whether sizes are those of a rehearsal."""
        return self.device == "cpu"

    def left(self) -> float:
        """Seconds."""
        return 60 * self.minutes - (time.monotonic() - self.began)

    def late(self) -> bool:
        """Whether no time is left, so that what was not done in time need not be broken."""
        return self.left() < 1

    def place(self, name: str) -> Path:
        """An empty folder of its own."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir(parents=True)
        return self.folder / name

    def ranks(self, size: int | None = None, *, environment: Mapping[str, str] | None = None) -> Any:
        """New ranks, see `Ranks`; jobs may come from `bench` or from the tests' folders."""
        return Ranks(
            size or self.nproc, device=self.device, paths=TESTS, environment=environment, left=self.left
        )

    def alone(
        self,
        call: str,
        *,
        timeout: float = 600,
        environment: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> Any:
        """A job in a child process of its own."""
        with self.ranks(1, environment=environment) as child:
            return child.run(call, timeout=timeout, **arguments)[0]


Need = Callable[[Check], str | None]  # says what is missing, None where nothing is


def package(*modules: str, called: str) -> Need:
    """Python packages."""

    def missing(check: Check) -> str | None:
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        return f"{called} is not installed here ({', '.join(absent)} missing)" if absent else None

    return missing


def gpu_gib(least: float) -> Need:
    """Memory of a GPU; nothing in a rehearsal, whose sizes are small."""

    def missing(check: Check) -> str | None:
        if check.small:
            return None
        import torch

        found = torch.cuda.get_device_properties(0).total_memory / GIB
        return f"it takes {least:g} GiB of a GPU, and this one has {found:.0f}" if found < least else None

    return missing


def disk_gib(least: float) -> Need:
    """Room where scratch files go."""

    def missing(check: Check) -> str | None:
        free = shutil.disk_usage(check.folder).free / GIB
        if check.small or free >= least:
            return None
        return f"it writes {least:g} GiB, and {check.folder} has {free:.0f} free: set TMPDIR to a larger disk"

    return missing


def a_gpu(check: Check) -> str | None:
    """What a rehearsal on a CPU cannot do at all."""
    return "it needs a GPU" if check.small else None


def clone(check: Check) -> str | None:
    """The jobs and the oracle of the tests."""
    there = all(folder.is_dir() for folder in TESTS)
    return None if there else f"it runs jobs of tests/, and {ROOT} has none: start it from a clone"


def ranks_at_least(number: int) -> Need:
    """Of --nproc."""

    def missing(check: Check) -> str | None:
        return f"it needs --nproc {number}" if check.nproc < number else None

    return missing


NEMO = package(
    "nemo",
    "megatron",
    "lightning",
    "hydra",
    "transformers",
    "psutil",
    "filelock",
    called="the training stack",
)
PYTEST = package("pytest", called="pytest (requirements/dev.txt)")
TRANSFORMER_ENGINE = package("transformer_engine", called="Transformer Engine")


@dataclass(frozen=True)
class Bar:
    """A promise: the measured number is at most the limit.

    Attributes:
        key: of `bars` in what the part finds, whose values have `measured` and `limit`.
        what: is promised, in words.
        bound: the limit in words.
        on_gpu: it says nothing of a rehearsal.
    """

    key: str
    what: str
    bound: str
    on_gpu: bool = True


@dataclass(frozen=True)
class Part:
    """A row of the check.

    Attributes:
        name: for --parts.
        title: of its section.
        needs: what it cannot do without.
        seconds: expected on an H100.
        work: finds out; what it returns is JSON and may have `bars`.
        table: what it found as Markdown.
        bars: what it is judged by.
    """

    name: str
    title: str
    needs: Sequence[Need]
    seconds: float
    work: Callable[[Check], dict[str, Any]]
    table: Callable[[Mapping[str, Any]], str]
    bars: Sequence[Bar] = ()


def run_part(part: Part, check: Check) -> dict[str, Any]:
    """What a part found, or why it was skipped or failed; nothing that it or one of its needs raises goes on."""
    began = time.monotonic()
    try:
        if (missing := next(filter(None, (need(check) for need in part.needs)), None)) is not None:
            raise SkipPart(missing)
        expected, left = part.seconds * check.scale, check.left()
        if expected > left:
            raise SkipPart(
                f"it would take about {expected / 60:.1f} minutes, and --minutes leaves {max(left, 0) / 60:.1f}"
            )
        began = time.monotonic()
        return {"status": "done", "found": part.work(check), "seconds": time.monotonic() - began}
    except SkipPart as skipped:
        return {"status": "skipped", "reason": str(skipped)}
    except Exception as error:  # the other parts still tell something
        seconds = time.monotonic() - began
        if isinstance(error, RankFailed) and check.late():
            return {"status": "skipped", "reason": f"{TIME_IS_UP}: {error}", "seconds": seconds}
        log.exception("%s", part.name)
        if isinstance(error, RankFailed):
            log.error("%s", error.log)
        reason = str(error) if isinstance(error, RankFailed) else sentence(error)
        return {"status": "failed", "reason": reason, "seconds": seconds}


def run_parts(parts: Sequence[Part], check: Check) -> Iterator[tuple[Part, dict[str, Any]]]:
    """All parts, one after another, the first ones first; what no longer fits the time is skipped, and what still does is not.

    Expected seconds are scaled by what the parts so far took over what was expected of them.
    """
    took, expected = 0.0, 0.0
    for part in parts:
        log.info("%s: %s", part.name, part.title)
        result = run_part(part, check)
        if result["status"] == "done":
            took, expected = took + result["seconds"], expected + part.seconds
            check.scale = took / expected
        yield part, result


def verdicts(
    parts: Sequence[Part], results: Mapping[str, Mapping[str, Any]], *, device: str
) -> list[dict[str, Any]]:
    """Every bar of the parts: passed, missed, or unmeasured and why."""
    rows = []
    for part in parts:
        result = results.get(part.name, {"status": "skipped", "reason": "it has not run yet"})
        told = result.get("found", {}).get("bars", {})
        for bar in part.bars:
            row = {"part": part.name, "what": bar.what, "bound": bar.bound}
            found = told.get(bar.key)
            if bar.on_gpu and device == "cpu":
                row |= {"verdict": UNMEASURED, "reason": "rehearsed on a CPU"}
            elif found is None or found.get("measured") is None:
                reason = (found or {}).get("reason") or result.get("reason") or "the part did not measure it"
                row |= {"verdict": UNMEASURED, "reason": reason}
            else:
                # written so that a number that is none is missed, too
                passed = found["measured"] <= found["limit"]
                row |= {"verdict": "passed" if passed else "missed", **found}
            rows.append(row)
    return rows


def bars_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The bars as Markdown."""
    lines = ["| part | what | bound | limit | measured | verdict |", "| --- " * 6 + "|"]
    for row in rows:
        numbers = [f"{row[key]:.4g}" if key in row else "" for key in ("limit", "measured")]
        verdict = "**missed**" if row["verdict"] == "missed" else row["verdict"]
        if row["verdict"] == UNMEASURED:
            verdict += f": {cell(row['reason'])}"
        lines.append(
            f"| {row['part']} | {row['what']} | {row['bound']} | {' | '.join(numbers)} | {verdict} |"
        )
    return "\n".join(lines)


def cell(text: object) -> str:
    """One line that a table can hold."""
    return (str(text).splitlines() or [""])[0].replace("|", "/")


def free_of(path: Path) -> None:
    """Removes a folder and says nothing if it is not there; runs of real sizes leave tens of GB."""
    shutil.rmtree(path, ignore_errors=True)
