"""``python -m asft_nemo.nemo.simulate JOBS OUT``: simulations in a process of their own; `asft_nemo.commands.simulation` starts it.

JOBS is a JSON list of objects with ``run`` (`asft_nemo.config.schema.to_dict`), ``spec`` (the fields of `asft_nemo.model.ModelSpec`), ``kernels``
and ``trace``, the arguments of `simulate`; OUT gets the list of results, or an object with ``error``, what the user can mend (exit code 2): a
broken rule, or what Megatron refuses while it makes a config of the settings.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from asft_nemo.config.schema import from_dict
from asft_nemo.errors import UserError
from asft_nemo.model import ModelSpec
from asft_nemo.nemo.simulate.run import simulate


def main(jobs_file: str, out_file: str) -> int:
    """Simulates one job after the other. Returns the exit code."""
    gc.freeze()  # what imports made is no garbage: looking through it takes half a second each time
    done = []
    try:
        for job in json.loads(Path(jobs_file).read_text()):
            run, spec = from_dict(job["run"]), ModelSpec(**job["spec"])
            simulation = simulate(run, spec, kernels=job["kernels"], trace_stages=job["trace"])
            done.append(simulation.as_dict())
    except UserError as error:
        Path(out_file).write_text(json.dumps({"error": str(error)}))
        return 2
    Path(out_file).write_text(json.dumps(done, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
