"""What the ranks do for the tests of `tools/gpu_check.py`: its own jobs, in ranks that are there already."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def call(job: str, arguments: dict[str, Any]) -> Any:
    """Calls a job of `tools/`, given as ``module:function``."""
    tools = str(Path(__file__).resolve().parents[2] / "tools")
    if tools not in sys.path:
        sys.path.insert(0, tools)
    module, _, name = job.partition(":")
    return getattr(importlib.import_module(module), name)(**arguments)
