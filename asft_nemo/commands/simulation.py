"""Simulations of runs at full size, each group of them in a process of its own: NeMo takes 15 s to import, and Megatron's state is global."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asft_nemo.config import rules
from asft_nemo.config.schema import RunConfig, to_dict
from asft_nemo.errors import ConfigError
from asft_nemo.model import ModelSpec
from asft_nemo.planner.time import shape_of

_GB = 1e9
# (key of a stage, its words), in the order of the table
_COLUMNS = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("reference", "reference"),
    ("reference_hidden", "its hidden states"),
    ("activations_in_flight", "activations"),
    ("loss", "loss"),
    ("peak", "peak"),
)


@dataclass(frozen=True)
class Job:
    """One run to simulate.

    Attributes:
        run, spec: settings and architecture; neither weights nor a directory are read.
        kernels: ``te`` = what Transformer Engine's layers keep, ``local`` = Megatron's own.
        trace: also send a micro batch through the first, the middle and the last stage.
    """

    run: RunConfig
    spec: ModelSpec
    kernels: str = "te"
    trace: bool = True

    def as_dict(self) -> dict[str, Any]:
        """As `asft_nemo.nemo.simulate` reads it."""
        return {
            "run": to_dict(self.run),
            "spec": asdict(self.spec),
            "kernels": self.kernels,
            "trace": self.trace,
        }


def simulated(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Simulates runs one after the other, in one process on the CPU. Its warnings go to stderr.

    Returns:
        For each what `asft_nemo.nemo.simulate.Simulation` holds.

    Raises:
        ConfigError: settings that break a rule, before the process starts; or what Megatron refuses, in its words.
        RuntimeError: the simulation failed otherwise.
    """
    for job in jobs:
        rules.check(job.run, shape=shape_of(job.spec))
    environment = {**os.environ, "ASFT_DEVICE": "cpu", "ASFT_TRITON": "0", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="asft-simulation-") as folder:
        asked, out = Path(folder) / "jobs.json", Path(folder) / "out.json"
        asked.write_text(json.dumps([job.as_dict() for job in jobs]))
        command = [sys.executable, "-m", "asft_nemo.nemo.simulate", str(asked), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 2):
            raise RuntimeError(f"the simulation failed: {done.stderr.strip()[-2000:]}")
        results = json.loads(out.read_text())
    if done.returncode:
        raise ConfigError(results["error"])
    return results


def in_words(simulation: dict[str, Any]) -> str:
    """A table of the stages in GB, and what was simulated instead of what was asked for."""
    layers = {"te": "Transformer Engine's layers (stand-ins)", "local": "Megatron's own layers"}
    lines = [f"simulated: {layers[simulation['kernels']]}, {simulation['precision']}", *simulation["notes"]]
    lines.append("GB on each GPU of a stage, and its parameters; - where no micro batch was traced:")
    lines.append("  ".join(["stage", *(words for _, words in _COLUMNS), "parameters"]))
    for stage in simulation["stages"]:
        cells = [f"{stage['stage']:5}"]
        for key, words in _COLUMNS:
            value = "-" if stage[key] is None else f"{stage[key] / _GB:.2f}"
            cells.append(value.rjust(len(words)))
        lines.append("  ".join([*cells, f"{stage['parameters']:,}"]))
    return "\n".join(lines)
