"""Writes the checkpoint of `tools/bench/te_checkpoint.py` on a CPU, in Megatron's own layers. Run as a program: OUT SCRATCH."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from bench import te_checkpoint  # pyright: ignore[reportMissingImports]

if __name__ == "__main__":
    te_checkpoint.write(Path(sys.argv[1]), Path(sys.argv[2]), "bf16")
